from __future__ import annotations

import pytest
import torch

from hlrp_core.codes.accuracy import CodeCounts, code_accuracy
from hlrp_core.codes.decoding import make_decoder, pick_codes
from hlrp_core.contract import SamplingOptions


def test_constant_accuracy_is_that_of_the_most_frequent_code_at_each_position():
    counts = CodeCounts(codebook_size=4, code_seq_len=2)
    assert counts.constant_accuracy() == 0.0
    counts.add(torch.tensor([[3, 0], [3, 1], [2, 1]]))
    counts.add(torch.tensor([[3, 1]]))
    assert counts.most_frequent.tolist() == [3, 1]
    assert counts.constant_accuracy() == pytest.approx((3 + 3) / 8)
    assert counts.counts.tolist() == [[0, 0, 1, 3], [1, 3, 0, 0]]


def test_code_accuracy():
    assert code_accuracy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0], [3, 4]])) == 0.75


def test_picking_codes():
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0]])
    assert pick_codes(logits, SamplingOptions()).tolist() == [1, 0]
    drawn = [
        pick_codes(logits.expand(2, 3), SamplingOptions(temperature=3.0, generator=torch.Generator().manual_seed(s)))
        for s in range(20)
    ]
    assert len({tuple(d.tolist()) for d in drawn}) > 2
    with pytest.raises(ValueError, match="temperature"):
        SamplingOptions(temperature=-1)


def test_unknown_decoding_offers_the_closest():
    with pytest.raises(ValueError, match=r"constrained, generate, free.*Did you mean 'constrained'"):
        make_decoder("constraind", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of") as error:
        make_decoder("zzz", None)  # type: ignore[arg-type]
    assert "mean" not in str(error.value)
