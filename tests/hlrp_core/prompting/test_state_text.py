"""The state as text in the prompt: which numbers, in which prompts, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import load_backend, save_pretrained
from hlrp_core.contract import ActionBatch, BackendMode, FoundationBatch
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.prompting.state_text import find_bins, write_states
from hlrp_core.registry import get_recipe

CODES = BackendMode.CODES
NAMES = ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"]
PROCESSORS = {"qwen3_vl": "qwen3_vl", "smolvlm": "smolvlm2_500m"}  # family -> published processor
STATE = torch.tensor([[-9.0, -0.01, 0.01], [3.0, 9.0, 1.5]])
TEXTS = ["State: 0 127 128;", "State: 255 255 192;"]


@pytest.fixture(scope="module")
def build(make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    def build(name: str = "qwen_chat", *, backbone=None, head: str | None = None, **prompt) -> ComposedBackend:
        settings = {} if backbone is None else {"backbone": backbone}
        return make_tiny_backend(name, head, prompt=PromptConfig(**{"state_text": True, **prompt}), **settings)

    return build


def batch_of(state: torch.Tensor | None, instructions: list[str] | None = None, **labels) -> ActionBatch:
    instructions = instructions or ["reach the red disc", ""]
    frames = torch.zeros(len(instructions), 1, 48, 48, 3, dtype=torch.uint8)
    return ActionBatch(frames=frames, instructions=instructions, state=state, **labels)


def read(backend: ComposedBackend, batch: FoundationBatch, *, for_prediction: bool = True) -> list[str]:
    """The prompts as a person would read them, without padding."""
    tokens = backend._prompt(batch, for_prediction=for_prediction).tokens
    rows = zip(tokens.ids, tokens.valid_mask, strict=True)
    return [backend.core.tokenizer.decode(ids[mask], skip_special_tokens=False) for ids, mask in rows]


# -- the numbers ------------------------------------------------------------------------------------------------------


def test_bins_are_even_and_what_lies_beyond_falls_into_the_outer_ones():
    config = PromptConfig(state_text=True)
    assert write_states(STATE, config) == TEXTS
    edges = torch.linspace(-3, 3, 257, dtype=torch.float64)
    middles = (edges[:-1] + edges[1:]) / 2
    assert torch.equal(find_bins(middles[None], config)[0], torch.arange(256))
    assert find_bins(torch.tensor([[-1e30, 1e30]]), config).tolist() == [[0, 255]]


def test_bins_of_a_state_between_minus_one_and_one_are_those_of_pi05():
    """pi0.5 (openpi, `PaligemmaTokenizer`): `np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1`."""
    config = PromptConfig(state_text=True, state_range=1.0)
    state = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    edges = torch.linspace(-1, 1, 257, dtype=torch.float64)[:-1]
    expected = torch.bucketize(state.double(), edges, right=True) - 1
    assert torch.equal(find_bins(state, config), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_will_do(dtype):
    assert write_states(STATE[:1, :1].to(dtype), PromptConfig(state_text=True)) == ["State: 0;"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("state_template", "no place"), ("state_bins", 1), ("state_range", 0.0), ("state_range", float("nan"))],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=rf"prompt\.{setting}: expected.*Next step"):
        PromptConfig(**{setting: value})


# -- the prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_behind_the_words_and_nothing_else_changes(name, build):
    without = read(build(name, state_text=False), batch_of(STATE))
    prompts = read(build(name), batch_of(STATE))
    said = [f"\n{TEXTS[0]}", TEXTS[1]]  # nothing stands before it where there are no words
    for prompt, plain, text in zip(prompts, without, said, strict=True):
        assert prompt.count(text) == 1
        assert prompt.replace(text, "") == plain
    assert f"reach the red disc\n{TEXTS[0]}" in prompts[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_both_ways_to_the_ids_agree_on_published_processors(
    name, side, make_tiny_backend, real_processor, tmp_path_factory
):
    strategy = published(name, make_tiny_backend, real_processor, tmp_path_factory)
    core = strategy.core
    instructions = ["reach the red disc", "", "schieb <ACT_3> <|im_start|> <image>: 把 🤖"]
    state = torch.cat([STATE, STATE.flip(1)[:1]])
    frames = torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8)
    for few_shot in ("", "State: 1 2 3; -> done"):
        outputs = []
        for length_from in ("tokenizer", "processor"):
            config = PromptConfig(state_text=True, length_from=length_from, few_shot=few_shot)
            both = type(strategy)(core, config).encode([frames], instructions, padding_side=side, state=state)
            outputs.append(both.tokens)
        fast, slow = outputs
        assert torch.equal(fast.ids, slow.ids)
        assert torch.equal(fast.valid_mask, slow.valid_mask)
        assert torch.equal(fast.positions, slow.positions)
        assert fast.is_padded
        for ids, mask, text, words in zip(
            fast.ids, fast.valid_mask, [*TEXTS, "State: 128 127 0;"], instructions, strict=True
        ):
            prompt = core.tokenizer.decode(ids[mask], skip_special_tokens=False)
            assert "\n".join(filter(None, (words, text))) in prompt


_published: dict = {}


def published(name, make_tiny_backend, real_processor, tmp_path_factory):
    """A strategy on a tiny random model with the published processor and its whole vocabulary."""
    if name not in _published:
        family = get_recipe(name).family
        folder = tmp_path_factory.mktemp("backbone") / family
        write_random_checkpoint(folder, family=family, processor=real_processor(PROCESSORS[family]))
        _published[name] = make_tiny_backend(name, backbone=folder).prompting
    return _published[name]


def test_the_state_is_seen_without_the_words(build):
    backend = build("qwen_plain", use_instruction=False)
    one, other = read(backend, batch_of(STATE)), read(backend, batch_of(STATE, ["open", "close the drawer"]))
    assert one == other
    assert one[0].startswith(TEXTS[0])


def test_words_cannot_take_the_states_place(build):
    words = "go to {state} {instruction}"
    assert f"{words}\n{TEXTS[0]}" in read(build(), batch_of(STATE[:1], [words]))[0]


@pytest.mark.parametrize("name", [*NAMES, "smol_latent_head"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_reach_a_samples_loss(name, side, build):
    """A sample's loss is the same alone and in a batch whose prompts are longer."""
    backend = build(name, padding_side=side).eval()
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    together = backend.loss_from_batch(batch_of(STATE, target_codes=codes), mode=CODES).per_sample
    for row in range(2):
        words = ["reach the red disc", ""][row : row + 1]
        alone = batch_of(STATE[row : row + 1], words, target_codes=codes[row : row + 1])
        loss = backend.loss_from_batch(alone, mode=CODES).per_sample
        torch.testing.assert_close(loss, together[row : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "smol_latent_head"])
def test_the_state_decides_and_off_it_does_not(name, build):
    batch, other = batch_of(STATE), batch_of(STATE.flip(0))
    on, off = build(name), build(name, state_text=False)
    a, b = (on.latent_from_batch(each, mode=CODES).logits for each in (batch, other))
    assert (a != b).any(-1).any(-1).all()
    a, b = (off.latent_from_batch(each, mode=CODES).logits for each in (batch, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("is_written", [True, False])
def test_prompts_with_a_state_are_not_kept(is_written, build):
    """Hardly two of them are alike: they would only fill the memory."""
    backend = build(state_text=is_written)
    prompts = [read(backend, batch_of(state)) for state in (STATE, STATE + 0.5, STATE)]
    assert prompts[0] == prompts[2]
    assert (prompts[0] != prompts[1]) == is_written
    assert bool(backend.prompting._prompts) != is_written


def test_an_action_head_on_the_prompt_sees_it(build):
    backend = build(head="prefix_flow")
    batch = fake_batch(backend)
    assert backend.loss_from_batch(batch, mode=BackendMode.MULTITASK).loss.isfinite()
    prompts = read(backend, batch, for_prediction=False)
    assert prompts == read(backend, batch, for_prediction=True)
    for prompt, text in zip(prompts, write_states(batch.state, backend.config.prompt), strict=True):
        assert text in prompt


# -- what is refused --------------------------------------------------------------------------------------------------


def test_no_state_is_an_error(build):
    backend = build()
    for batch in (batch_of(None), batch_of(torch.zeros(2, 0)), FoundationBatch(batch_of(None).frames, ["", ""])):
        with pytest.raises(ValueError, match=r"state: expected \[B, D\] for prompt\.state_text.*Next step"):
            backend.latent_from_batch(batch, mode=CODES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_state_is_an_error_that_names_the_sample(value, build):
    state = STATE.clone()
    state[1, 2] = value
    with pytest.raises(ValueError, match=r"state: expected finite numbers.*samples \[1\].*Next step"):
        build().latent_from_batch(batch_of(state), mode=CODES)


def test_too_long_a_state_is_an_error_and_not_cut(build):
    with pytest.raises(ValueError, match=r"at most 4096 tokens.*got \d+.*Next step"):
        build().latent_from_batch(batch_of(torch.zeros(2, 3000)), mode=CODES)


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_settings_travel(build, tmp_path):
    prompt = {"state_bins": 64, "state_range": 1.0, "state_template": "at {state}"}
    backend = build("smol_plain", **prompt).eval()
    save_pretrained(backend, tmp_path / "b")
    loaded = load_backend(tmp_path / "b")
    assert loaded.config.prompt == replace(PromptConfig(state_text=True), **prompt)
    assert read(loaded, batch_of(STATE)) == read(backend, batch_of(STATE))
    assert "at 0 31 32" in read(loaded, batch_of(STATE))[0]
    logits = [each.latent_from_batch(batch_of(STATE), mode=CODES).logits for each in (backend, loaded)]
    assert torch.equal(*logits)
