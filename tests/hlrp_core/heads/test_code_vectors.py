"""A LAQ's code vectors: standardised and restored, found by code and by distance, handed over once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.heads.code_vectors import CodeVectors, hand_over_code_vectors

K, S, D = 6, 3, 2
RAW = 5 + 0.3 * torch.randn(S, K, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def table() -> CodeVectors:
    table = CodeVectors(K, S, D, owner="a test")
    table.set_vectors(RAW)
    return table


def test_standardised_is_centred_by_position_and_scaled_by_one_number(table):
    codes = torch.cartesian_prod(*[torch.arange(K)] * S)
    vectors = table.lookup(codes)  # every code of every position equally often
    torch.testing.assert_close(vectors.mean(0), torch.zeros(S, D), atol=1e-5, rtol=0)
    assert vectors.square().mean().item() == pytest.approx(1, abs=1e-5)
    raw = torch.stack([torch.stack([RAW[s, code] for s, code in enumerate(row)]) for row in codes])
    ratio = (raw - RAW.mean(1)) / vectors
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0, 0].item()), atol=1e-3, rtol=1e-3)


def test_named_inverses(table):
    codes = torch.randint(0, K, (5, S))
    raw = torch.stack([RAW[torch.arange(S), row] for row in codes])
    torch.testing.assert_close(table.restore(table.lookup(codes)), raw)
    torch.testing.assert_close(table.standardize(raw), table.lookup(codes), atol=1e-5, rtol=1e-5)
    assert torch.equal(table.nearest(table.lookup(codes)), codes)
    torch.testing.assert_close(table(F.one_hot(codes, K).float()), table.lookup(codes))


def test_nearest_equals_a_loop(table):
    vectors = torch.randn(20, S, D)
    expected = [
        [min(range(K), key=lambda k, v=vectors[i, s], s=s: float((v - all_[s, k]).norm())) for s in range(S)]
        for i in range(20)
        for all_ in [table.lookup(torch.arange(K)[:, None].expand(-1, S)).transpose(0, 1)]
    ]
    assert table.nearest(vectors).tolist() == expected


def test_the_mean_vector_is_that_of_the_counted_codes(table):
    codes = torch.randint(0, K, (40, S))
    counts = F.one_hot(codes, K).sum(0)  # (S, K)
    torch.testing.assert_close(table.mean_vectors(counts), table.lookup(codes).mean(0))
    assert not table.mean_vectors(torch.zeros(S, K)).any()  # nothing counted: the centre


def test_equal_vectors_break_nothing():
    table = CodeVectors(K, S, D, owner="a test")
    table.set_vectors(torch.full((S, K, D), 3.0))  # an untrained learnt codebook
    codes = torch.randint(0, K, (5, S))
    assert not table.lookup(codes).any()
    assert (table.restore(torch.zeros(5, S, D)) == 3).all()


def test_handed_over_to_every_head_that_has_some():
    module = torch.nn.ModuleList([CodeVectors(K, S, D, owner="one"), torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"code vectors of one.*got None.*code_vector_table"):
        hand_over_code_vectors(module, None)
    hand_over_code_vectors(module, RAW)
    assert torch.equal(module[0].vectors, RAW)
    with pytest.raises(ValueError, match=r"code vectors of one: expected \[3, 6, 2\].*got \[3, 5, 2\]"):
        hand_over_code_vectors(module, RAW[:, :5])
    hand_over_code_vectors(module[1], None)
