from __future__ import annotations

import json
import math

import pytest
import torch

from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import ActionBatch, BackendMode, FoundationBatch, LatentOutput, LossOutput
from hlrp_core.training import count_codes, evaluate_codes
from hlrp_core.training.evaluation import mean_perplexity, select

K, S = 4, 2


def labelled(codes, valid=None) -> FoundationBatch:
    size = len(codes)
    return FoundationBatch(
        torch.zeros(size, 2, 2, 2, 3, dtype=torch.uint8),
        [f"{i}" for i in range(size)],
        torch.tensor(codes),
        None if valid is None else torch.tensor(valid),
    )


class Oracle:
    """A VLABackend that says what it is told to; it notes what it was shown."""

    name, codebook_size, code_seq_len, modes = "oracle", K, S, frozenset({BackendMode.CODES})

    def __init__(self, answers):
        self.answers = [torch.tensor(a) for a in answers]
        self.seen: list[FoundationBatch] = []

    def setup(self, *, device): ...

    def loss_from_batch(self, batch, *, mode):
        assert not torch.is_grad_enabled()
        return LossOutput(torch.tensor(float(batch.batch_size)), {"code_accuracy": 0.25})

    def latent_from_batch(self, batch, *, mode, sampling=None):
        self.seen.append(batch)
        return LatentOutput(tokens=self.answers[len(self.seen) - 1])


def test_figures():
    batches = [
        labelled([[0, 1], [2, 3], [1, 1]], [True, True, False]),
        labelled([[0, 1]], [False]),
        labelled([[0, 3], [0, 3]]),
    ]
    backend = Oracle([[[0, 1], [2, 0]], [[0, 3], [1, 3]]])
    result = evaluate_codes(backend, batches)
    assert result.num_samples == 4
    assert [batch.batch_size for batch in backend.seen] == [2, 2]  # invalid samples and batches cost nothing
    assert backend.seen[0].frames.shape[1] == 1
    assert result.code_accuracy == pytest.approx(6 / 8)
    assert result.position_accuracy == pytest.approx([3 / 4, 3 / 4])
    assert result.joint_accuracy == pytest.approx(2 / 4)
    # the most frequent: 0 at the first position (3 of 4), 3 at the second (3 of 4)
    assert result.constant_accuracy == pytest.approx(6 / 8)
    assert result.constant_joint_accuracy == pytest.approx(2 / 4)
    assert result.constant_from == "evaluation"
    assert result.loss == pytest.approx(2.0)
    assert result.teacher_forced_accuracy == pytest.approx(0.25)
    assert result.unparsed == 0
    json.dumps(result.as_dict())
    assert "75.0%" in result.as_table()


def test_the_constant_prediction_is_made_on_the_training_codes():
    counts = CodeCounts(K, S)
    counts.add(torch.tensor([[1, 2], [1, 2], [0, 3]]))
    result = evaluate_codes(Oracle([[[0, 0], [0, 0]]]), [labelled([[1, 3], [1, 2]])], training_counts=counts)
    assert result.constant_accuracy == pytest.approx(3 / 4)
    assert result.constant_from == "training"


def test_codes_that_did_not_parse_are_wrong():
    result = evaluate_codes(Oracle([[[-1, -1], [0, 3]]]), [labelled([[0, 3], [0, 3]])])
    assert result.unparsed == 0.5
    assert result.code_accuracy == 0.5
    assert result.prediction_perplexity == pytest.approx(1.0)
    assert "did not parse" in result.as_table()
    none = evaluate_codes(Oracle([[[-1, -1]]]), [labelled([[0, 3]])])
    assert math.isnan(none.prediction_perplexity)


def test_first_batches_alone():
    batches = [labelled([[0, 1]])] * 5
    assert evaluate_codes(Oracle([[[0, 1]]] * 5), batches, max_batches=2).num_samples == 2
    assert count_codes(batches, codebook_size=K, code_seq_len=S, max_batches=3).counts.sum() == 6


def test_nothing_to_evaluate():
    for batches in ([], [labelled([[0, 1]], [False])], [FoundationBatch(torch.zeros(1, 1, 2, 2, 3).byte(), ["x"])]):
        with pytest.raises(ValueError, match="at least one sample with valid codes"):
            evaluate_codes(Oracle([]), batches)


def test_counting_leaves_out_what_is_not_valid():
    counts = count_codes([labelled([[0, 1], [2, 3]], [True, False])], codebook_size=K, code_seq_len=S)
    assert counts.counts.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_perplexity():
    assert mean_perplexity(torch.tensor([[0, 1]] * 9), K) == pytest.approx(1.0)
    assert mean_perplexity(torch.arange(K)[:, None].expand(K, 2), K) == pytest.approx(K)
    mixed = torch.tensor([[0, 1], [1, 1]])
    assert mean_perplexity(mixed, K) == pytest.approx((2 + 1) / 2)


def test_views_stay_with_their_samples():
    view = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3)
    batch = ActionBatch(
        torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8),
        ["a", "b", "c"],
        torch.zeros(3, S, dtype=torch.long),
        views={"wrist": view},
        actions=torch.zeros(3, 1, 1),
    )
    part = select(batch, torch.tensor([True, False, True]))
    assert part.instructions == ["a", "c"]
    assert part.views["wrist"][:, 0, 0, 0].tolist() == [0, 2]
    assert part.actions is None


def test_a_real_backend_is_left_as_it_was(make_tiny_backend):
    backend = make_tiny_backend("qwen_plain", image_size=48).train()
    backend.core.eval()
    were = [module.training for module in backend.modules()]
    batch = fake_batch(backend)
    counts = backend._code_counts.counts.clone()
    result = evaluate_codes(backend, [batch])
    assert [module.training for module in backend.modules()] == were
    assert torch.is_grad_enabled()
    assert torch.equal(backend._code_counts.counts, counts)  # held-out labels do not reach the constant prediction
    codes = backend.latent_from_batch(batch, mode=BackendMode.CODES).tokens
    assert result.code_accuracy == pytest.approx((codes == batch.target_codes).float().mean().item())
    with pytest.raises(ZeroDivisionError):
        evaluate_codes(backend, (1 // 0 for _ in range(1)))
    assert [module.training for module in backend.modules()] == were
