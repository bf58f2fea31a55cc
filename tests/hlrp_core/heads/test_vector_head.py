"""Continuous latents: their losses against slow twins, what they learn, how they are drawn."""

from __future__ import annotations

import pytest
import torch

from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import vector_head
from hlrp_core.heads.action_head import ActionContext, PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding
from hlrp_core.heads.vector_head import VectorFlowHead, VectorHead, VectorRegressionHead

W, K, S, D, B = 12, 6, 3, 2, 5
SIZES = {"codebook_size": K, "code_seq_len": S, "code_vector_dim": D}
RAW = 2 + 3 * torch.randn(S, K, D, generator=torch.Generator().manual_seed(0))
KINDS = ("regression", "flow")


@pytest.fixture(autouse=True)
def tiny_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_head, "_EXPERT_WIDTH", 32)
    monkeypatch.setattr(vector_head, "_EXPERT_LAYERS", 1)


def build(kind: str, seed: int = 0) -> VectorHead:
    torch.manual_seed(seed)
    head = VectorFlowHead(W, **SIZES) if kind == "flow" else VectorRegressionHead(W, pooling="mean", **SIZES)
    head.table.set_vectors(RAW)
    return head.eval()


def make_prefix(filler: float = 0.0, size: int = B) -> PrefixEncoding:
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(size, 7, dtype=torch.bool)
    mask[::2, :3] = False
    hidden = torch.randn(size, 7, W, generator=rng).masked_fill(~mask[..., None], filler)
    return PrefixEncoding(hidden, mask)


def make_codes(size: int = B) -> torch.Tensor:
    return torch.randint(0, K, (size, S), generator=torch.Generator().manual_seed(2))


def loss(head: VectorHead, prefix: PrefixEncoding, codes: torch.Tensor):
    return head.loss(None, BackboneEncoding(prefix, None), codes)  # type: ignore[arg-type]


def test_regression_is_the_squared_error_of_the_codes_vectors():
    head, prefix, codes = build("regression"), make_prefix(), make_codes()
    result = loss(head, prefix, codes)
    answer = head.readout(prefix)
    scale = (RAW - RAW.mean(1, keepdim=True)).square().mean().sqrt()
    for row in range(B):
        errors = [
            (answer[row, s, d] - (RAW[s, codes[row, s], d] - RAW[s, :, d].mean()) / scale) ** 2
            for s in range(S)
            for d in range(D)
        ]
        assert result.per_sample[row].item() == pytest.approx(sum(errors).item() / (S * D), rel=1e-4)  # type: ignore[union-attr]
    assert torch.equal(result.predicted, head.table.nearest(answer))


def test_flow_is_that_of_the_expert_over_the_standardised_vectors():
    head, prefix, codes = build("flow"), make_prefix(), make_codes()
    torch.manual_seed(3)
    result = loss(head, prefix, codes)
    torch.manual_seed(3)
    expected = head.flow.per_sample_loss(ActionContext(prefix=prefix), head.table.lookup(codes), None)
    assert torch.equal(result.per_sample, expected)
    start = torch.zeros(B, S, D)
    mean = start - head.flow.velocity(ActionContext(prefix=prefix), start, torch.ones(B))
    assert torch.equal(result.vector, mean)
    assert not result.vector.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_padding_does_not(kind):
    head, prefix = build(kind), make_prefix(float("nan"))
    prefix.hidden.requires_grad_()
    loss(head, prefix, make_codes()).per_sample.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert prefix.hidden.grad.isfinite().all()
    assert not prefix.hidden.grad[~prefix.valid_mask].any()
    assert prefix.hidden.grad[prefix.valid_mask].any()
    other = head.predict(None, None, sampling(0), encoding=BackboneEncoding(make_prefix(100.0), None))  # type: ignore[arg-type]
    same = head.predict(None, None, sampling(0), encoding=BackboneEncoding(make_prefix(), None))  # type: ignore[arg-type]
    torch.testing.assert_close(other.vector, same.vector)


def sampling(seed: int, **settings) -> SamplingOptions:
    return SamplingOptions(generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_under_autocast(kind):
    head, encoding = build(kind), BackboneEncoding(make_prefix(), None)  # type: ignore[arg-type]
    expected = head.predict(None, None, sampling(0), encoding=encoding).vector  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.predict(None, None, sampling(0), encoding=encoding).vector, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_vectors_and_reports_how_well(kind):
    """Two prefixes, each with its own codes: predicted in the LAQ's units, and better than the mean vector."""
    head = build(kind).train()
    prefix, codes = make_prefix(size=2), torch.tensor([[0, 1, 2], [5, 4, 3]])
    counts = CodeCounts(K, S)
    counts.add(codes)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(200):
        result = loss(head, prefix, codes)
        result.per_sample.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = head.measure(result, codes, counts)
    assert set(measured) == set(head.metric_names)
    target = head.table.lookup(codes)
    constant = (target - target.mean(0)).square().mean().item()
    assert measured["constant_vector_loss"] == pytest.approx(constant, rel=1e-4)
    assert measured["vector_loss"] < 0.2 * constant
    assert measured["code_accuracy"] == 1
    with torch.no_grad():
        latent = head.eval().predict(None, None, sampling(0), encoding=BackboneEncoding(prefix, None))  # type: ignore[arg-type]
    raw = RAW[torch.arange(S), codes]
    assert (latent.vector - raw).square().mean() < 0.2 * (raw - raw.mean(0)).square().mean()


def test_a_flow_draws_and_a_regression_does_not():
    prefix = BackboneEncoding(make_prefix(), None)  # type: ignore[arg-type]

    def draw(kind: str, options: SamplingOptions) -> torch.Tensor:
        return build(kind).predict(None, None, options, encoding=prefix).vector  # type: ignore[arg-type, return-value]

    assert torch.equal(draw("flow", sampling(0)), draw("flow", sampling(0)))
    assert not torch.equal(draw("flow", sampling(0)), draw("flow", sampling(1)))
    assert torch.equal(draw("regression", sampling(0)), draw("regression", sampling(1)))
    # what belongs to the action chunk of the same call is not for the latents
    of_actions = {"noise": torch.randn(B, 8, 4), "prev_chunk_left_over": torch.randn(B, 2, 4), "inference_delay": 1}
    assert torch.equal(draw("flow", sampling(0, **of_actions)), draw("flow", sampling(0)))


def test_the_number_of_flow_steps_is_a_matter_of_sampling():
    head, prefix = build("flow"), make_prefix()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    one = head.answer(prefix, sampling(0, num_flow_steps=1))
    noise = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0))
    expected = noise - head.flow.velocity(ActionContext(prefix=prefix), noise, torch.ones(B))
    torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
    usual = head.answer(prefix, sampling(0))
    assert torch.equal(head.answer(prefix, sampling(0, num_flow_steps=10)), usual)
    assert not torch.allclose(one, usual)
    with pytest.raises(ValueError, match="num_flow_steps: expected 1 or more, or None, got 0"):
        SamplingOptions(num_flow_steps=0)


def test_forgotten_vectors_cannot_pass_for_some():
    head = VectorRegressionHead(W, pooling="mean", **SIZES)
    encoding = BackboneEncoding(make_prefix(), None)  # type: ignore[arg-type]
    assert head.predict(None, None, SamplingOptions(), encoding=encoding).vector.isnan().all()  # type: ignore[arg-type, union-attr]
