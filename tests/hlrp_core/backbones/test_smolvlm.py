"""The SmolVLM core = transformers' own model on the processor's own output, whatever is padded, split or black."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from hlrp_core.backbones.loading import load_core
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backbones.smolvlm import SmolVLMCore, _patch_positions
from hlrp_core.backbones.token_batch import EncodedPrompt, TokenBatch
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import load_backend, save_pretrained
from hlrp_core.contract import BackendMode, FoundationBatch
from hlrp_core.prompting.prompt import PromptConfig

TEXTS = ["reach the red disc", "", "push the green block to the left of the table, slowly", "open the drawer"]
REAL = "smolvlm2_500m"


@pytest.fixture(scope="module")
def tiny(tiny_backbone: Callable) -> Path:
    return tiny_backbone("smolvlm")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, real_processor: Callable) -> Path:
    """A tiny random model with the published processor and its whole vocabulary."""
    folder = tmp_path_factory.mktemp("backbone") / "real-smolvlm"
    return write_random_checkpoint(folder, family="smolvlm", processor=real_processor(REAL))


def build_core(folder: Path, **images) -> SmolVLMCore:
    core = load_core(folder, family="smolvlm", **images)
    assert isinstance(core, SmolVLMCore)
    return core.eval()


def make_frames(size: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size, height, width, 3), generator=rng, dtype=torch.uint8)


def encode(core: SmolVLMCore, frames: Tensor, texts: list[str], side: str) -> tuple[TokenBatch, object]:
    """`<text><image>` prompts, padded on `side`."""
    images = core.process_images(frames)
    prompts = []
    for text, layout in zip(texts, images.layouts, strict=True):
        ids = core.tokenizer.encode(text, add_special_tokens=False) if text else []
        ids = torch.tensor([*ids, *core.image_ids(layout)])
        prompts.append(EncodedPrompt(ids, core.build_positions(ids, [layout])))
    pad_id = core.tokenizer.pad_token_id
    return TokenBatch.pad(prompts, pad_id=pad_id, side=side, device=torch.device("cpu")), images


@pytest.mark.parametrize("images", [{}, {"image_size": 48}, {"image_splitting": True}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_logits_equal_transformers(images, side, tiny):
    core = build_core(tiny, **images)
    theirs = SmolVLMForConditionalGeneration.from_pretrained(tiny).eval()
    frames = make_frames(4, 64, 96)
    with torch.no_grad():
        tokens, ours = encode(core, frames, TEXTS, side)
        assert tokens.is_padded
        hidden, _ = core(tokens, ours)
        core.tokenizer.padding_side = side
        inputs = core.processor(
            text=[text + "<image>" for text in TEXTS],
            images=core.images_for_processor(frames, 1),
            do_pad=True,  # as it comes: with a pixel mask
            padding=True,
            return_tensors="pt",
        )
        assert bool(inputs["pixel_attention_mask"].all())
        assert torch.equal(inputs["input_ids"], tokens.ids)
        expected = theirs(**inputs, output_hidden_states=True)
    where = tokens.valid_mask
    torch.testing.assert_close(hidden[where], expected.hidden_states[-1][where], rtol=0, atol=1e-5)
    torch.testing.assert_close(core.lm_head(hidden)[where], expected.logits[where], rtol=0, atol=1e-5)


def test_gradients_equal_transformers(tiny):
    core = build_core(tiny)
    theirs = SmolVLMForConditionalGeneration.from_pretrained(tiny)
    tokens, images = encode(core, make_frames(4), TEXTS, "left")
    weights = torch.linspace(-1, 1, core.hidden_dim)
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.valid_mask.long()}
    expected = theirs.model(**inputs, pixel_values=images.tensors["pixel_values"]).last_hidden_state
    for hidden in (core(tokens, images)[0], expected):
        (hidden[tokens.valid_mask] * weights).square().mean().backward()
    ours = dict(core.model.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert ours[key].grad is None, key
        else:
            scale = float(parameter.grad.abs().max()) + 1e-6
            torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=0, atol=1e-4 * scale, msg=key)


def test_a_cache_continues_as_one_run_would(tiny):
    core = build_core(tiny)
    more = torch.tensor([[5, 6, 7]] * 4)
    with torch.no_grad():
        for side in ("left", "right"):
            tokens, images = encode(core, make_frames(4), TEXTS, side)
            whole, none = core(tokens.append(more), images)
            assert none is None
            _, cache = core(tokens, images, use_cache=True)
            tail, _ = core(tokens.continuation(more), cache=cache)
            lengths = tokens.valid_mask.sum(1) if side == "right" else torch.full((4,), tokens.ids.shape[1])
            for row, length in enumerate(lengths.tolist()):
                torch.testing.assert_close(tail[row], whole[row, length : length + 3], rtol=0, atol=1e-5)


def test_only_image_tokens_take_image_features_and_only_later_tokens_see_them(tiny):
    core = build_core(tiny)
    ids = [*core.tokenizer.encode("push"), *core.image_ids((0, 0)), *core.tokenizer.encode("the disc")]
    prompt = EncodedPrompt(torch.tensor(ids), core.build_positions(torch.tensor(ids), [(0, 0)]))
    tokens = TokenBatch.pad([prompt], pad_id=0, side="left", device=torch.device("cpu"))
    first = ids.index(core.tokenizer.convert_tokens_to_ids("<image>"))
    with torch.no_grad():
        one, other = (core(tokens, core.process_images(make_frames(1, seed=seed)))[0][0] for seed in (0, 1))
    torch.testing.assert_close(one[:first], other[:first], rtol=0, atol=1e-6)
    assert (one[first:] - other[first:]).abs().amax(1).min() > 1e-4


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", [False, True])
def test_published_settings(splitting, real):
    """One tile is 64 tokens between two marks; the published 17 tiles are 1,088, and row and column marks."""
    core = build_core(real, image_splitting=splitting)
    images = core.process_images(make_frames(2, 224, 224))
    num_tiles = 17 if splitting else 1
    assert images.layouts == [(4, 4) if splitting else (0, 0)] * 2
    assert images.tensors["pixel_values"].shape == (1, 2 * num_tiles, 3, 512, 512)
    ids = core.image_ids(images.layouts[0])
    assert ids.count(49190) == 64 * num_tiles
    assert ids[0] == ids[-1] == 49189
    if not splitting:
        assert len(ids) == 67


def test_tiles_of_a_wide_image_and_of_another_size(tiny):
    core = build_core(tiny, image_splitting=True, image_size=32)
    images = core.process_images(make_frames(1, 48, 96))
    assert images.layouts == [(2, 4)]
    assert images.tensors["pixel_values"].shape == (1, 9, 3, 32, 32)
    assert core.image_ids((2, 4)).count(core.model.config.image_token_id) == 9 * 4
    again = build_core(tiny, image_splitting=True)
    assert again.process_images(make_frames(1, 48, 96)).layouts == [(2, 4)]


def test_the_image_processor_is_the_torch_one_and_close_to_the_published_one(real):
    published = AutoProcessor.from_pretrained(real).image_processor
    core = build_core(real)
    assert type(published).__name__.endswith("Pil")
    assert not type(core.processor.image_processor).__name__.endswith("Pil")
    smooth = make_frames(1, 7, 7).permute(0, 3, 1, 2).float()
    smooth = torch.nn.functional.interpolate(smooth, size=(96, 96), mode="bilinear").byte().permute(0, 2, 3, 1)
    theirs = published(images=[[smooth[0].permute(2, 0, 1)]], do_image_splitting=False, return_tensors="pt")
    ours = core.process_images(smooth).tensors["pixel_values"]
    # theirs goes up to 2,048 pixels and back, by Lanczos
    assert (ours - theirs["pixel_values"]).abs().mean() < 0.01


def test_settings_survive_saving(tiny, tmp_path):
    core = build_core(tiny, image_size=32)
    core.save_architecture(tmp_path)
    core.model.save_pretrained(tmp_path)
    frames = make_frames(2, 48, 48)
    for images in ({}, {"image_size": 32}):
        again = build_core(tmp_path, **images)
        assert torch.equal(
            again.process_images(frames).tensors["pixel_values"], core.process_images(frames).tensors["pixel_values"]
        )
    assert build_core(tmp_path, image_splitting=True).process_images(frames).layouts == [(4, 4)] * 2


@pytest.mark.parametrize("size", [0, 8, 40])
def test_an_image_size_that_does_not_fit_the_patches_is_refused(size, tiny):
    with pytest.raises(ValueError, match=rf"image_size: expected a multiple of 16.*got {size}.*image_size=(16|32|48)"):
        build_core(tiny, image_size=size)


def test_splitting_with_another_family_is_refused(tiny_qwen):
    with pytest.raises(ValueError, match="image_splitting: expected False with a backbone of the qwen3_vl family"):
        load_core(tiny_qwen, family="qwen3_vl", image_splitting=True)


@pytest.mark.parametrize("table", [2, 8, 14, 24, 27, 32, 37])
def test_patch_positions_equal_transformers(table):
    class Config:
        hidden_size, image_size, patch_size, num_channels = 1, 4 * table, 4, 3

    embeddings = SmolVLMVisionEmbeddings(Config())
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(table**2)[:, None])
        for rows in (1, 2, table - 1, table, table + 3):
            side = 4 * rows
            expected = embeddings(torch.zeros(1, 3, side, side), torch.ones(1, rows, rows, dtype=torch.bool))
            assert torch.equal(_patch_positions(rows, table), expected.flatten().long())


def black_and_other_frames() -> Tensor:
    return make_frames(4) * torch.tensor([1, 0, 1, 0], dtype=torch.uint8)[:, None, None, None]


@pytest.mark.parametrize("all_black", [False, True])
def test_black_frames_do_not_vanish(all_black, tiny):
    """With these settings a black frame is all zeros, which transformers takes for padding and drops."""
    core = build_core(tiny)
    core.processor.image_processor.do_normalize = False
    frames = black_and_other_frames()
    if all_black:
        frames = torch.zeros_like(frames)
    with torch.no_grad():
        tokens, images = encode(core, frames, TEXTS, "left")
        pixels = images.tensors["pixel_values"]
        assert not pixels[0, 1].any()
        dropped = core.model.model.get_image_features(pixels).pooler_output
        assert len(dropped) == (1 if all_black else 2)
        assert len(core.encode_images(images)) == 4
        hidden, _ = core(tokens, images)
        for row in range(4):
            alone_tokens, alone_images = encode(core, frames[[row]], TEXTS[row : row + 1], "left")
            alone, _ = core(alone_tokens, alone_images)
            torch.testing.assert_close(hidden[row][tokens.valid_mask[row]], alone[0], rtol=0, atol=1e-5)


def test_black_frames_decode_alike(make_tiny_backend):
    backend = make_tiny_backend("smol_plain").eval()
    backend.core.processor.image_processor.do_normalize = False
    batch = FoundationBatch(black_and_other_frames()[:, None], TEXTS)
    constrained = backend.latent_from_batch(batch, mode=BackendMode.CODES).tokens
    inputs = backend._prompt(batch, for_prediction=True)
    with torch.no_grad():
        written = backend.core.generate(inputs.tokens, inputs.images, GenerationConfig(max_new_tokens=3))
    assert written.shape == (4, 3)
    slow = make_tiny_backend("smol_plain", decoding="generate").eval()
    slow.load_state_dict(backend.state_dict())
    slow.core.processor.image_processor.do_normalize = False
    assert torch.equal(slow.latent_from_batch(batch, mode=BackendMode.CODES).tokens, constrained)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize("name", ["smol_chat", "smol_plain"])
def test_prompts_of_tokenizer_and_processor_are_equal(name, splitting, make_tiny_backend):
    for position in ("before", "after"):
        for num_images in (1, 2):
            backend = make_tiny_backend(
                name, image_splitting=splitting, prompt=PromptConfig(image_position=position, system="You are a robot.")
            )
            backend.prompting.check_length_sources(num_images)


@pytest.mark.parametrize("name", ["smol_chat", "smol_plain"])
def test_prompts_with_the_published_processor(name, real, make_tiny_backend):
    for position in ("before", "after"):
        backend = make_tiny_backend(name, backbone=real, prompt=PromptConfig(image_position=position))
        backend.prompting.check_length_sources(2)
        frames = make_frames(3, 48, 64)
        texts = ["reach the red disc", "", "a <image> <ACT_3> <end_of_utterance> <row_1_col_1> <global-img> 🤖"]
        results = []
        for source in ("tokenizer", "processor"):
            config = PromptConfig(image_position=position, length_from=source)
            maker = type(backend.prompting)(backend.core, config)
            results.append(maker.encode([frames], texts, padding_side="left"))
        fast, slow = results
        assert torch.equal(fast.tokens.ids, slow.tokens.ids)
        assert torch.equal(fast.tokens.positions, slow.tokens.positions)
        assert torch.equal(fast.images.tensors["pixel_values"], slow.images.tensors["pixel_values"])
        assert fast.images.layouts == slow.images.layouts == [(0, 0)] * 3


def test_chat_prompts_with_the_image_first_are_what_apply_chat_template_gives(real, make_tiny_backend):
    backend = make_tiny_backend("smol_chat", backbone=real, prompt=PromptConfig(image_position="before"))
    frame = make_frames(1, 48, 64)
    for text in ("reach the red disc", "Push it, slowly; wait 3.5 s."):
        content = [{"type": "image", "image": frame[0].permute(2, 0, 1)}, {"type": "text", "text": text}]
        expected = backend.core.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ours = backend.prompting.encode([frame], [text], padding_side="left")
        assert ours.tokens.ids[0].tolist() == expected["input_ids"][0].tolist()
        assert torch.equal(ours.images.tensors["pixel_values"], expected["pixel_values"])


def test_chat_without_a_template_is_an_error_at_setup(tiny, tmp_path, make_tiny_backend):
    folder = tmp_path / "no-template"
    folder.mkdir()
    for path in tiny.iterdir():
        if path.name != "chat_template.json":
            (folder / path.name).write_bytes(path.read_bytes())
    make_tiny_backend("smol_plain", backbone=folder)
    with pytest.raises(ValueError, match=r"chat template.*Next step: choose prompting=plain"):
        make_tiny_backend("smol_chat", backbone=folder)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_without_spare_rows_grows_and_travels(tiny, tmp_path, make_tiny_backend):
    """As in the published models: as many rows as the tokenizer has entries."""
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    processor = AutoProcessor.from_pretrained(tiny)
    num_old = len(processor.tokenizer)
    model.resize_token_embeddings(num_old, mean_resizing=False)
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    backend = make_tiny_backend("smol_chat", backbone=tmp_path / "full").eval()
    assert backend.core.lm_head.out_features == num_old + 10
    batch = fake_batch(backend)
    assert backend.loss_from_batch(batch, mode=BackendMode.CODES).loss.isfinite()
    save_pretrained(backend, tmp_path / "bundle")
    loaded = load_backend(tmp_path / "bundle")
    expected = backend.latent_from_batch(batch, mode=BackendMode.CODES).logits
    assert torch.equal(loaded.latent_from_batch(batch, mode=BackendMode.CODES).logits, expected)


@pytest.mark.parametrize("settings", [{"image_splitting": True}, {"image_size": 32}], ids=str)
def test_a_saved_backend_keeps_its_image_settings(settings, tmp_path, make_tiny_backend):
    backend = make_tiny_backend("smol_plain", **settings).eval()
    save_pretrained(backend, tmp_path / "bundle")
    loaded = load_backend(tmp_path / "bundle")
    batch = fake_batch(backend)
    for each in (backend, loaded):
        each.setup(device=torch.device("cpu"))
    expected = backend.latent_from_batch(batch, mode=BackendMode.CODES).logits
    assert torch.equal(loaded.latent_from_batch(batch, mode=BackendMode.CODES).logits, expected)
    assert (
        loaded._prompt(batch, for_prediction=True).images.layouts
        == backend._prompt(batch, for_prediction=True).images.layouts
    )


def test_inference_mode_leaves_nothing_that_breaks_training(tiny):
    core = build_core(tiny)
    with torch.inference_mode():
        core(*encode(core, make_frames(2), TEXTS[:2], "left"))
    core(*encode(core, make_frames(2), TEXTS[:2], "left"))[0].square().mean().backward()
