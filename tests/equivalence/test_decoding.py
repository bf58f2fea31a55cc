"""Fast decoding over the cache = Hugging Face's `generate`, and every way to start it = the same codes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import BackendMode, FoundationBatch, SamplingOptions
from hlrp_core.prompting.prompt import PromptConfig

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown")
THINGS = ("disc", "ring", "big wooden block", "star", "cup on the table", "cross", "drawer", "lever, then the button")
PROMPTS = [f"push the {colour} {thing}" for colour, thing in product(COLOURS, THINGS)]  # 64 of several lengths
SMALLEST_GAP = 1e-3  # of the two best logits: far above rounding, so that equal codes are no coin toss


def fit(backend: ComposedBackend, *, steps: int = 25, seed: int = 0) -> FoundationBatch:
    """Train a little, so that the prompts get different codes; returns the batch of all prompts."""
    rng = torch.Generator().manual_seed(seed)
    size, K, S = len(PROMPTS), backend.codebook_size, backend.code_seq_len
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (size, 1, 24, 24, 3), generator=rng, dtype=torch.uint8),
        instructions=PROMPTS,
        target_codes=torch.randint(0, K, (size, S), generator=rng),
    )
    optimizer = torch.optim.AdamW(backend.parameters(), lr=3e-3)
    for _ in range(steps):
        backend.train().loss_from_batch(batch, mode=BackendMode.CODES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    backend.eval()
    return batch


def decode(backend: ComposedBackend, decoding: str, batch: FoundationBatch, **sampling):
    backend.code_head.decoder = make_decoder(decoding, backend.code_head.vocabulary)
    return backend.latent_from_batch(batch, mode=BackendMode.CODES, sampling=SamplingOptions(**sampling))


@pytest.mark.parametrize("separator", [" ", ""])
@pytest.mark.parametrize(("code_seq_len", "codebook_size"), [(4, 8), (8, 256)])
def test_constrained_equals_generate(code_seq_len, codebook_size, separator, make_tiny_backend, record_property):
    backend = make_tiny_backend(
        "qwen_chat",
        code_seq_len=code_seq_len,
        codebook_size=codebook_size,
        token_scheme=TokenSchemeConfig(separator=separator),
        image_size=24,
    )
    batch = fit(backend, steps=25 if codebook_size == 8 else 40)
    fast, slow = decode(backend, "constrained", batch), decode(backend, "generate", batch)

    best = fast.logits.topk(2, dim=-1).values
    gap = (best[..., 0] - best[..., 1]).min().item()
    distinct = len({tuple(codes) for codes in slow.tokens.tolist()})
    record_property("smallest_gap_of_two_best_logits", gap)
    record_property("distinct_outputs", distinct)
    print(f"S={code_seq_len} K={codebook_size}: {distinct} distinct outputs of {len(PROMPTS)}, smallest gap {gap:.2g}")
    assert distinct > len(PROMPTS) // 2
    certain = (best[..., 0] - best[..., 1]).min(1).values > SMALLEST_GAP
    assert certain.sum() >= 56
    assert torch.equal(fast.tokens[certain], slow.tokens[certain])
    assert torch.equal(fast.tokens, fast.logits.argmax(-1))


@pytest.mark.parametrize("name", ["qwen_chat", "qwen_plain"])
def test_a_batch_of_mixed_lengths_decodes_like_each_sample_alone(name, make_tiny_backend: Callable):
    backend = make_tiny_backend(name, image_size=24)
    batch = fit(backend)
    together = decode(backend, "constrained", batch)
    for row in range(0, len(PROMPTS), 9):
        one = FoundationBatch(batch.frames[[row]], [PROMPTS[row]])
        alone = decode(backend, "constrained", one)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=0, atol=1e-4)


def test_logits_are_those_of_a_teacher_forced_forward(make_tiny_backend: Callable):
    backend = make_tiny_backend(image_size=24)
    batch = fit(backend)
    output = decode(backend, "constrained", batch)
    written = FoundationBatch(batch.frames, batch.instructions, output.tokens)
    inputs = backend._prompt(written, for_prediction=True)
    with torch.no_grad():
        encoding = backend._encode_with_completion(
            inputs, backend.code_head.completion(output.tokens), use_cache=False
        )
        logits = backend.core.lm_head(encoding.completion_hidden)
    vocabulary = backend.code_head.vocabulary
    expected = logits[:, vocabulary.code_slots][:, :, vocabulary.code_ids]
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-4)


def test_training_padding_does_not_change_predictions(make_tiny_backend: Callable):
    """Prediction pads left whatever training does: `generate` on right-padded prompts is wrong."""
    left = make_tiny_backend(image_size=24)
    right = make_tiny_backend(image_size=24, prompt=PromptConfig(padding_side="right"))
    batch = fit(left)
    right.load_state_dict(left.state_dict())
    right.eval()
    for decoding in ("constrained", "generate"):
        assert torch.equal(decode(left, decoding, batch).tokens, decode(right, decoding, batch).tokens)


def test_codes_from_a_shared_prefix_equal_codes_decoded_alone(make_tiny_backend: Callable):
    """What multitask training does: the prompt's cache, cut back behind the completion, serves the decoder."""
    backend = make_tiny_backend(image_size=24)
    batch = fit(backend)
    inputs = backend._prompt(batch, for_prediction=True)
    with torch.no_grad():
        shared = backend._encode_with_completion(
            inputs, backend.code_head.completion(batch.target_codes), use_cache=True
        )
        prefix_alone = backend._encode(inputs, use_cache=True)
        torch.testing.assert_close(shared.prefix.hidden, prefix_alone.prefix.hidden, rtol=0, atol=1e-5)
        assert shared.cache.get_seq_length() == inputs.tokens.ids.shape[1]
        alone = backend.code_head.predict(backend.core, inputs, SamplingOptions())
        from_prefix = backend.code_head.predict(backend.core, inputs, SamplingOptions(), encoding=prefix_alone)
        from_shared = backend.code_head.predict(backend.core, inputs, SamplingOptions(), encoding=shared)
    torch.testing.assert_close(from_prefix.logits, alone.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(from_shared.logits, alone.logits, rtol=0, atol=1e-5)


def test_sampling_follows_the_distribution_and_its_generator(make_tiny_backend: Callable):
    backend = make_tiny_backend(image_size=24)
    batch = fit(backend, steps=5)
    first = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(1))
    again = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(1))
    other = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    cold = decode(backend, "constrained", batch, temperature=1e-4, generator=torch.Generator().manual_seed(1))
    assert (cold.tokens == decode(backend, "constrained", batch).tokens).float().mean() > 0.98
    sampled = decode(backend, "generate", batch, temperature=1.0)
    assert sampled.tokens.min() >= 0
    assert sampled.tokens.max() < backend.codebook_size
    with pytest.raises(ValueError, match="generator"):
        decode(backend, "generate", batch, generator=torch.Generator())


def test_free_decoding_reports_what_does_not_parse_and_repairs_nothing(make_tiny_backend: Callable):
    backend = make_tiny_backend(image_size=24)
    untrained = FoundationBatch(torch.zeros(2, 1, 24, 24, 3, dtype=torch.uint8), PROMPTS[:2])
    lost = decode(backend, "free", untrained)
    assert lost.tokens.tolist() == [[-1] * 4] * 2
    assert set(lost.meta["unparsed"]) == {0, 1}
    assert all(isinstance(text, str) for text in lost.meta["unparsed"].values())

    batch = fit(backend, steps=40)
    free, constrained = decode(backend, "free", batch), decode(backend, "constrained", batch)
    parsed = (free.tokens >= 0).all(1)
    assert parsed.float().mean() > 0.9
    assert ((free.tokens >= 0).any(1) == parsed).all()  # whole or not at all
    assert torch.equal(free.tokens[parsed], constrained.tokens[parsed])
    assert set(free.meta["unparsed"]) == set((~parsed).nonzero().flatten().tolist())
