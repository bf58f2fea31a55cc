"""Fast decoding over the cache = Hugging Face's `generate`, and every way to start it = the same codes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from transformers import GenerationConfig

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import BackendMode, FoundationBatch, SamplingOptions
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.registry import get_recipe

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown")
THINGS = ("disc", "ring", "big wooden block", "star", "cup on the table", "cross", "drawer", "lever, then the button")
PROMPTS = [f"push the {colour} {thing}" for colour, thing in product(COLOURS, THINGS)]  # 64 of several lengths
IMAGE_SIZE = {"qwen3_vl": 24, "smolvlm": 16}
SMALLEST_GAP = 1e-3  # of the two best logits: far above rounding, so that equal codes are no coin toss


def fit(backend: ComposedBackend, *, steps: int = 36) -> FoundationBatch:
    """Learn codes that the words decide, until the prompts get different ones; returns the batch of all prompts."""
    K, S = backend.codebook_size, backend.code_seq_len
    colour, thing = torch.arange(len(PROMPTS)) // len(THINGS), torch.arange(len(PROMPTS)) % len(THINGS)
    codes = [colour * 31 + 7 * slot if slot % 2 == 0 else thing * 13 + 5 * slot for slot in range(S)]
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (len(PROMPTS), 1, 24, 24, 3), dtype=torch.uint8),
        instructions=PROMPTS,
        target_codes=torch.stack(codes, dim=1) % K,
    )
    optimizer = torch.optim.AdamW(backend.parameters(), lr=3e-3)
    for _ in range(steps):
        backend.train().loss_from_batch(batch, mode=BackendMode.CODES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    backend.eval()
    return batch


@pytest.fixture(scope="module")
def build(make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    def build(name: str, head: str | None = None, **settings) -> ComposedBackend:
        return make_tiny_backend(name, head, image_size=IMAGE_SIZE[get_recipe(name).family], **settings)

    return build


@pytest.fixture(scope="module", params=["qwen_chat", "smol_chat"])
def fitted(request: pytest.FixtureRequest, build: Callable) -> tuple[ComposedBackend, FoundationBatch]:
    backend = build(request.param)
    return backend, fit(backend)


def decode(backend: ComposedBackend, decoding: str, batch: FoundationBatch, **sampling):
    backend.code_head.decoder = make_decoder(decoding, backend.code_head.vocabulary)
    return backend.latent_from_batch(batch, mode=BackendMode.CODES, sampling=SamplingOptions(**sampling))


@pytest.mark.parametrize(
    ("name", "code_seq_len", "codebook_size", "separator", "steps"),
    [
        ("qwen_chat", 4, 8, " ", 36),
        ("qwen_plain", 4, 8, "", 20),
        ("qwen_plain", 8, 256, " ", 36),
        ("qwen_chat", 8, 256, "", 20),
        ("smol_chat", 4, 8, " ", 60),
        ("smol_plain", 4, 8, "", 20),
    ],
)
def test_constrained_equals_generate(name, code_seq_len, codebook_size, separator, steps, build, record_property):
    sizes = {"code_seq_len": code_seq_len, "codebook_size": codebook_size}
    scheme = TokenSchemeConfig(separator=separator)
    backend = build(name, token_scheme=scheme, **sizes)
    batch = fit(backend, steps=steps)
    fast, slow = decode(backend, "constrained", batch), decode(backend, "generate", batch)

    best = fast.logits.topk(2, dim=-1).values
    gap = (best[..., 0] - best[..., 1]).min().item()
    distinct = len({tuple(codes) for codes in slow.tokens.tolist()})
    record_property("smallest_gap_of_two_best_logits", gap)
    record_property("distinct_outputs", distinct)
    print(f"S={code_seq_len} K={codebook_size}: {distinct} distinct outputs of {len(PROMPTS)}, smallest gap {gap:.2g}")
    assert distinct == len(PROMPTS)  # one answer for all prompts would prove little
    assert gap > SMALLEST_GAP
    assert torch.equal(fast.tokens, slow.tokens)
    assert torch.equal(fast.tokens, fast.logits.argmax(-1))


CHECKPOINT_SETTINGS: dict[str, Callable[[list[int]], dict]] = {  # of the ids of the codes
    "a penalty": lambda _: {"repetition_penalty": 1.3},
    "no repetition": lambda _: {"no_repeat_ngram_size": 3},
    "beams": lambda _: {"num_beams": 4},
    "forbidden tokens": lambda ids: {"suppress_tokens": ids[:4]},
    "sampling": lambda _: {"do_sample": True, "temperature": 5.0, "min_p": 0.5},
}


@pytest.mark.parametrize("kind", CHECKPOINT_SETTINGS)
def test_generate_ignores_what_the_checkpoint_sets_for_chat(kind, fitted, monkeypatch):
    backend, batch = fitted
    of_checkpoint = GenerationConfig(**CHECKPOINT_SETTINGS[kind](backend.code_head.vocabulary.code_ids.tolist()))
    monkeypatch.setattr(backend.core.model, "generation_config", of_checkpoint)
    slow = decode(backend, "generate", batch)
    assert torch.equal(slow.tokens, decode(backend, "constrained", batch).tokens)
    assert backend.core.model.generation_config is of_checkpoint  # which travels with a saved backend


def test_an_unknown_decoding_offers_the_closest(fitted):
    with pytest.raises(ValueError, match=r"decoding: expected one of .*Did you mean 'constrained'\? Next step"):
        make_decoder("constraint", fitted[0].code_head.vocabulary)


def test_a_batch_of_mixed_lengths_decodes_like_each_sample_alone(fitted):
    backend, batch = fitted
    together = decode(backend, "constrained", batch)
    for row in range(0, len(PROMPTS), 9):
        one = FoundationBatch(batch.frames[[row]], [PROMPTS[row]])
        alone = decode(backend, "constrained", one)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-5, atol=1e-4)


def test_logits_are_those_of_a_teacher_forced_forward(fitted):
    backend, batch = fitted
    output = decode(backend, "constrained", batch)
    inputs = backend._prompt(batch, for_prediction=True)
    completion = backend.code_head.completion(output.tokens)
    with torch.no_grad():
        encoding = backend._encode_with_completion(inputs, completion, use_cache=False)
        logits = backend.core.lm_head(encoding.completion_hidden)
    vocabulary = backend.code_head.vocabulary
    expected = logits[:, vocabulary.code_slots][:, :, vocabulary.code_ids]
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-4)


def test_training_padding_does_not_change_predictions(fitted, build: Callable):
    """Prediction pads left whatever training does: `generate` on right-padded prompts is wrong."""
    left, batch = fitted
    right = build(left.name, prompt=PromptConfig(padding_side="right")).eval()
    right.load_state_dict(left.state_dict())
    for decoding in ("constrained", "generate"):
        assert torch.equal(decode(left, decoding, batch).tokens, decode(right, decoding, batch).tokens)


def test_codes_from_a_shared_prefix_equal_codes_decoded_alone(fitted):
    """What multitask training does: the prompt's cache, cut back behind the completion, serves the decoder."""
    backend, batch = fitted
    decode(backend, "constrained", batch)
    inputs = backend._prompt(batch, for_prediction=True)
    completion = backend.code_head.completion(batch.target_codes)
    with torch.no_grad():
        shared = backend._encode_with_completion(inputs, completion, use_cache=True)
        prefix_alone = backend._encode(inputs, use_cache=True)
        valid = inputs.tokens.valid_mask
        torch.testing.assert_close(shared.prefix.hidden[valid], prefix_alone.prefix.hidden[valid], rtol=1e-5, atol=1e-4)
        assert shared.cache.get_seq_length() == inputs.tokens.ids.shape[1]
        alone = backend.code_head.predict(backend.core, inputs, SamplingOptions())
        from_prefix = backend.code_head.predict(backend.core, inputs, SamplingOptions(), encoding=prefix_alone)
        from_shared = backend.code_head.predict(backend.core, inputs, SamplingOptions(), encoding=shared)
    torch.testing.assert_close(from_prefix.logits, alone.logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(from_shared.logits, alone.logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", [BackendMode.ACTIONS, BackendMode.MULTITASK])
@pytest.mark.parametrize("name", ["qwen_chat", "smol_plain"])
def test_codes_to_learn_actions_from_are_the_same_with_gradient_checkpointing(name, mode, build: Callable):
    """There is no cache of the training step to decode from then."""
    backend = build(name, "mlp", code_conditioning="soft").train()
    batch = fake_batch(backend, image_side=24)
    expected = backend.loss_from_batch(batch, mode=mode)
    backend.core.model.gradient_checkpointing_enable()
    got = backend.loss_from_batch(batch, mode=mode)
    torch.testing.assert_close(got.per_sample, expected.per_sample, rtol=1e-5, atol=1e-5)
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in backend.action_head.parameters())
    if mode == BackendMode.MULTITASK:
        assert backend.core.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_sampling_follows_the_distribution_and_its_generator(fitted):
    backend, batch = fitted
    first = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(1))
    again = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(1))
    other = decode(backend, "constrained", batch, temperature=5.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    cold = decode(backend, "constrained", batch, temperature=1e-4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(cold.tokens, decode(backend, "constrained", batch).tokens)
    sampled = decode(backend, "generate", batch, temperature=5.0)
    assert sampled.tokens.min() >= 0
    assert sampled.tokens.max() < backend.codebook_size
    assert not torch.equal(sampled.tokens, first.tokens)
    with pytest.raises(ValueError, match="generator"):
        decode(backend, "generate", batch, temperature=1.0, generator=torch.Generator())
    unused = decode(backend, "generate", batch, generator=torch.Generator())  # greedy codes do not draw
    assert torch.equal(unused.tokens, decode(backend, "generate", batch).tokens)


@pytest.mark.parametrize("name", ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"])
def test_free_decoding_of_an_untrained_model_reports_and_repairs_nothing(name, build: Callable):
    backend = build(name).eval()
    batch = FoundationBatch(torch.zeros(2, 1, 24, 24, 3, dtype=torch.uint8), PROMPTS[:2])
    output = decode(backend, "free", batch)
    assert output.tokens.tolist() == [[-1] * 4] * 2
    assert set(output.meta["unparsed"]) == {0, 1}
    assert all(isinstance(text, str) for text in output.meta["unparsed"].values())
    assert output.logits is None


def test_free_decoding_of_a_trained_model_equals_constrained_where_it_parses(fitted):
    backend, batch = fitted
    free, constrained = decode(backend, "free", batch), decode(backend, "constrained", batch)
    parsed = (free.tokens >= 0).all(1)
    assert parsed.float().mean() > 0.5
    assert ((free.tokens >= 0).any(1) == parsed).all()  # whole or not at all
    assert torch.equal(free.tokens[parsed], constrained.tokens[parsed])
    assert set(free.meta["unparsed"]) == set((~parsed).nonzero().flatten().tolist())
