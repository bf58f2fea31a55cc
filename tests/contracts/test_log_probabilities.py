"""The log-probability of given codes, of every registered backend that predicts codes."""

from __future__ import annotations

import pytest
import torch
from backend_helpers import CODES

from hlrp_core import SamplingOptions, available_backends
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import FoundationBatch
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.registry import get_recipe

PREDICTS_CODES = [name for name in available_backends() if not get_recipe(name).predicts_vectors]


@pytest.fixture(params=PREDICTS_CODES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def same_sample(batch: FoundationBatch, size: int) -> FoundationBatch:
    """The first sample, `size` times, without labels."""
    return FoundationBatch(batch.frames[[0] * size], [batch.instructions[0]] * size)


def test_the_probabilities_of_all_codes_sum_to_one(build):
    backend = build(codebook_size=2, code_seq_len=3)
    with torch.no_grad():
        for parameter in backend.code_head.parameters():
            parameter.mul_(3)  # far from even
        backend.core.lm_head.weight.mul_(3)
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)  # (8, 3)
    log_probs = backend.latent_log_prob(same_sample(fake_batch(backend), 8), every)
    assert log_probs.shape == (8,)
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_probs.exp().std() > 0.01


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_log_probabilities_are_those_that_codes_are_drawn_with(build, padding_side):
    backend = build(prompt=PromptConfig(padding_side=padding_side))
    batch = fake_batch(backend, batch_size=4)  # instructions of several lengths
    for temperature in (0.0, 1.0):
        sampling = SamplingOptions(temperature=temperature, generator=torch.Generator().manual_seed(3))
        drawn = backend.latent_from_batch(batch, mode=CODES, sampling=sampling)
        chosen = drawn.logits.log_softmax(-1).gather(2, drawn.tokens[..., None])
        log_probs = backend.latent_log_prob(batch, drawn.tokens)
        torch.testing.assert_close(log_probs, chosen.sum((1, 2)), rtol=0, atol=1e-4)


def test_log_probabilities_follow_their_gradient(build):
    """One step up the gradient makes the codes likelier; batch mates and labels say nothing."""
    backend = build().train()
    batch = fake_batch(backend)
    codes = batch.target_codes
    before = backend.latent_log_prob(batch, codes)
    (-before.sum()).backward()
    assert backend.core.training
    optimizer = torch.optim.SGD([p for p in backend.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    with torch.no_grad():
        after = backend.latent_log_prob(batch, codes)
        assert not after.requires_grad
        assert after.sum() > before.sum()
        bare = FoundationBatch(batch.frames[[2, 0]], [batch.instructions[i] for i in (2, 0)])
        torch.testing.assert_close(backend.latent_log_prob(bare, codes[[2, 0]]), after[[2, 0]], rtol=0, atol=1e-4)


def test_codes_without_a_probability_are_errors(build):
    backend = build()
    batch = fake_batch(backend)
    for codes, text in (
        (torch.full((3, 4), -1), r"codes: expected codes in \[0, 8\), got -1"),  # what free decoding did not parse
        (torch.zeros(3, 5, dtype=torch.long), r"codes: expected long \[B, 4\].*\(3, 5\)"),
        (torch.zeros(2, 4, dtype=torch.long), r"B=3, got int64 \(2, 4\)"),
        (torch.zeros(3, 4), r"got float32 \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=text):
            backend.latent_log_prob(batch, codes)
