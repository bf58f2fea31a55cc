"""The LAQ model: shapes, determinism, saving, what its codes depend on."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.laq.code_provider import CodeProvider
from hlrp_core.laq.code_table import CodeTable, CodeTableHeader
from hlrp_core.laq.config import QUANTIZERS, LAQConfig, fsq_levels
from hlrp_core.laq.quantizer import LatentActionQuantizer, resize_images
from hlrp_core.laq.quantizers import make_quantizer

TINY = {"image_size": 16, "hidden_dim": 16, "num_layers": 1}


def make_laq(**settings) -> LatentActionQuantizer:
    torch.manual_seed(0)
    laq = LatentActionQuantizer(LAQConfig(**{**TINY, **settings}))
    with torch.no_grad():
        for _ in range(3):
            laq.train()(random_frames(16, laq.config.num_frames))  # statistics of the quantiser
    return laq.eval()


def random_frames(size: int, num_frames: int = 2, side: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size, num_frames, side, side, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("codebook_size", [2, 3, 8, 12, 64, 100, 256, 1024])
def test_fsq_levels_multiply_to_the_codebook_size(codebook_size):
    levels = fsq_levels(codebook_size)
    assert math.prod(levels) == codebook_size
    assert max(levels) <= 16


@pytest.mark.parametrize(
    ("codebook_size", "levels"), [(8, [8]), (16, [16]), (24, [6, 4]), (64, [8, 8]), (256, [16, 16])]
)
def test_fsq_levels_are_few_and_even(codebook_size, levels):
    assert fsq_levels(codebook_size) == levels


def test_a_codebook_size_without_levels_names_the_nearest():
    with pytest.raises(ValueError, match="use 16 or 18"):
        LAQConfig(codebook_size=17)


def test_a_depth_that_does_not_divide_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"divisor of code_seq_len=4, got 3.*Use 1"):
        LAQConfig(code_seq_len=4, fsq_depth=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_gap": 0}, r"laq.frame_gap: expected 1 or more, got 0. Next step: Use 1 or a larger number"),
        ({"codebook_size": 1}, r"laq.codebook_size: expected 2 or more, got 1. Next step"),
        ({"num_frames": 1}, r"laq.num_frames: expected 2 or more, got 1. Next step"),
        ({"image_size": 0}, r"laq.image_size: expected 1 or more, got 0. Next step"),
        ({"image_size": 2}, r"laq.image_size: expected a multiple of patch_size=4, got 2. Next step: Use 4"),
        ({"image_size": 67}, r"laq.image_size: expected a multiple of patch_size=4, got 67. Next step: Use 64"),
        ({"patch_size": 0}, r"laq.patch_size: expected 2 or more, got 0. Next step"),
        ({"patch_size": 3, "image_size": 63}, r"laq.patch_size: expected an even number, got 3. Next step: Use 4"),
        ({"hidden_dim": 0}, r"laq.hidden_dim: expected 8 or more, got 0. Next step"),
        ({"hidden_dim": 12}, r"laq.hidden_dim: expected a multiple of 8, got 12. Next step"),
        ({"num_layers": -1}, r"laq.num_layers: expected 1 or more, got -1. Next step"),
        ({"code_dim": 0}, r"laq.code_dim: expected 1 or more, got 0. Next step"),
        ({"fsq_depth": 0}, r"laq.fsq_depth: expected 1 or more, got 0. Next step"),
        ({"motion_weight": -1.0}, r"laq.motion_weight: expected 0 or more, got -1.0. Next step"),
        ({"quantizer": "vqvae"}, r"laq.quantizer: expected one of fsq, vq, diveq, got 'vqvae'. Next step: Choose"),
        ({"target": "words"}, r"laq.target: expected one of pixels, features, got 'words'. Next step"),
        ({"target": "features"}, r"laq.feature_encoder: expected the Hub id .* got none. Next step"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LAQConfig(**settings)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_smallest_sizes_work(quantizer):
    sizes = {"image_size": 2, "patch_size": 2, "hidden_dim": 8, "num_layers": 1, "code_dim": 1}
    laq = LatentActionQuantizer(LAQConfig(codebook_size=2, code_seq_len=1, quantizer=quantizer, **sizes))
    laq.train()(random_frames(4)).loss.backward()
    assert laq.encode(random_frames(4)).shape == (4, 1)


def test_codes_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"codes: expected \[B, 4\], got \(2, 3\). Next step: take codes of this LAQ"):
        make_laq().code_vectors(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("codebook_size", "code_seq_len"), [(8, 4), (256, 8)])
def test_codes_are_in_range_and_name_their_vectors(quantizer, codebook_size, code_seq_len):
    laq = make_laq(quantizer=quantizer, codebook_size=codebook_size, code_seq_len=code_seq_len)
    frames = random_frames(6)
    codes = laq.encode(frames)
    assert codes.shape == (6, code_seq_len)
    assert codes.dtype == torch.long
    assert 0 <= int(codes.min()) <= int(codes.max()) < codebook_size
    source, target = laq._transitions(laq.prepare(frames))
    condition = laq.quantizer(laq.encoder(source, target)).condition
    torch.testing.assert_close(laq.quantizer.condition(codes), condition, atol=1e-5, rtol=1e-5)
    vectors = laq.code_vectors(codes)
    assert vectors.shape == (6, code_seq_len, laq.quantizer.vector_dim)
    table = laq.code_vector_table()
    assert table.shape == (code_seq_len, codebook_size, laq.quantizer.vector_dim)
    assert torch.equal(table[torch.arange(code_seq_len), codes], vectors)


@pytest.mark.parametrize(("codebook_size", "levels"), [(8, 8), (256, 16)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_later_positions_refine_earlier_ones(codebook_size, levels, depth):
    quantizer = make_quantizer(LAQConfig(codebook_size=codebook_size, code_seq_len=4, fsq_depth=depth))
    latents = torch.randn(500, quantizer.latent_dim, generator=torch.Generator().manual_seed(0))
    soft = quantizer.train()(latents, hardness=0.0).condition  # what a quantiser of endless precision would hand on
    vectors = quantizer.vectors(quantizer(latents).codes).view(500, depth, -1)
    for used in range(1, depth + 1):
        error = (vectors[:, :used].sum(1) - soft).abs().max().item()
        assert error <= 1.01 / (levels - 1) * levels ** -(used - 1)


def test_the_gradient_passes_straight_through_the_quantiser():
    quantizer = make_quantizer(LAQConfig()).train()
    latents = torch.randn(64, quantizer.latent_dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradients = [
        torch.autograd.grad(quantizer(latents, hardness=h).condition.square().sum(), latents)[0] for h in (0.0, 1.0)
    ]
    cosine = torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0)
    assert cosine > 0.8


def test_more_frames_are_labelled_as_their_pairs():
    laq = make_laq(num_frames=4)
    frames = random_frames(5, 4)
    codes = laq.encode(frames)
    assert codes.shape == (5, 12)
    source, target = laq._transitions(laq.prepare(frames))
    pair_codes = laq.quantizer(laq.encoder(source, target)).codes
    assert torch.equal(codes, pair_codes.view(5, 12))
    assert torch.equal(laq.code_vector_table()[torch.arange(12), codes], laq.code_vectors(codes))
    assert laq.code_seq_len == 12


def test_codes_do_not_depend_on_the_rest_of_the_batch_or_the_mode():
    laq = make_laq()
    frames = random_frames(8)
    codes = laq.encode(frames)
    assert torch.equal(codes[2:3], laq.encode(frames[2:3]))
    assert torch.equal(codes, laq.train().encode(frames))
    assert laq.training


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_and_pictures_are_the_same_under_autocast(quantizer):
    """Labels asked for within the autocast of a policy's training are those of the code table."""
    laq = make_laq(quantizer=quantizer, codebook_size=256)
    frames = random_frames(64)
    codes = laq.encode(frames)
    decoded = laq.decode(frames[:, 0], codes)
    embedded = laq.embed(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.equal(laq.encode(frames), codes)
        assert torch.equal(laq.embed(frames), embedded)
        assert torch.equal(laq.encode_embedded(embedded), codes)
        assert torch.equal(laq.decode(frames[:, 0], codes), decoded)
        assert torch.equal(laq.provide_codes(frames=frames)[0], codes)


def calibration_statistics(laq: LatentActionQuantizer, frames: torch.Tensor, batch_size: int) -> list[torch.Tensor]:
    laq.calibrate(frames.split(batch_size))
    centre = laq.quantizer.centre
    return [centre.running_mean.clone(), centre.running_var.clone()]


@pytest.mark.parametrize("num_frames", [2, 3])
def test_calibration_depends_neither_on_the_batches_nor_on_their_order(num_frames):
    """Sorted by how much moves, as data that is grouped by task: batches differ more than the pairs of one of them."""
    laq = make_laq(num_frames=num_frames)
    strength = torch.linspace(0, 1, 33)[:, None, None, None, None]
    frames = (random_frames(33, num_frames) * strength).to(torch.uint8)
    with torch.no_grad():
        latents = laq._latents(laq._embed(laq.prepare(frames)))
    expected = [latents.mean(0), latents.var(0)]
    for batch_size in (33, 16, 4, 1):  # 16 and 4 leave a single one for the last
        for order in (torch.arange(33), torch.arange(33).flip(0)):
            got = calibration_statistics(laq, frames[order], batch_size)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_calibration_needs_a_spread(number):
    laq = make_laq()
    before = laq.weights_hash()
    with pytest.raises(ValueError, match=r"calibration: expected .* got (none|1). Next step"):
        laq.calibrate([random_frames(1)] * number)
    assert laq.weights_hash() == before


def calibrate(laq: LatentActionQuantizer) -> None:
    laq.calibrate(random_frames(16, seed=seed) for seed in range(1, 4))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_calibration_leaves_what_was_learnt(quantizer):
    """The decoder knows the codebook that it was trained with."""
    laq = make_laq(quantizer=quantizer, codebook_size=32)
    before = {name: value.clone() for name, value in laq.state_dict().items()}
    calibrate(laq)
    moved = {name for name, value in laq.state_dict().items() if not torch.equal(value, before[name])}
    statistics = ("running_mean", "running_var")
    assert moved == ({f"quantizer.centre.{name}" for name in statistics} if quantizer == "fsq" else set())


@pytest.mark.parametrize("quantizer", ["vq", "diveq"])
def test_calibration_gives_random_weights_a_codebook(quantizer):
    torch.manual_seed(0)
    laq = LatentActionQuantizer(LAQConfig(**TINY, quantizer=quantizer))
    assert not laq.code_vector_table().any()
    calibrate(laq)
    assert len(laq.encode(random_frames(64)).unique()) > 1
    before = laq.code_vector_table()
    laq.train()(random_frames(16))
    assert torch.equal(laq.code_vector_table(), before) == (quantizer == "diveq")  # learnt by gradient alone


def test_a_transition_run_backwards_has_the_opposite_latents():
    laq = make_laq()
    source, target = laq._transitions(laq.prepare(random_frames(6)))
    forwards = laq.encoder(source, target)
    torch.testing.assert_close(laq.encoder(target, source), -forwards)
    assert forwards.abs().amin() > 0
    assert not laq.encoder(source, source).any()


def test_training_starts_at_the_copy_of_frame_t():
    torch.manual_seed(0)
    output = LatentActionQuantizer(LAQConfig(**TINY))(random_frames(4))
    assert torch.equal(output.reconstruction, output.source)


def test_images_of_any_size_are_taken():
    laq = make_laq()
    assert laq.encode(random_frames(2, side=48)).shape == (2, 4)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 2, 16, 16, 3), torch.zeros(2, 2, 3, 16, 16, dtype=torch.uint8)])
def test_other_layouts_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected uint8 tensor \[B, T, H, W, 3\].*Next step"):
        make_laq().encode(wrong)


def test_saved_and_loaded_in_another_process_the_codes_are_equal(tmp_path: Path):
    laq = make_laq()
    laq.save_pretrained(tmp_path / "laq")
    script = (
        "import sys, torch; from hlrp_core.laq.quantizer import LatentActionQuantizer\n"
        f"laq = LatentActionQuantizer.from_pretrained({str(tmp_path / 'laq')!r})\n"
        "generator = torch.Generator().manual_seed(3)\n"
        "frames = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8, generator=generator)\n"
        "print(laq.encode(frames).tolist(), laq.weights_hash())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = f"{laq.encode(random_frames(4, seed=3)).tolist()} {laq.weights_hash()}"
    assert printed.strip().splitlines()[-1] == expected


def test_a_folder_with_altered_settings_is_refused(tmp_path: Path):
    make_laq().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"codebook_size": 8', '"codebook_size": 16'))
    with pytest.raises(ValueError, match="expected the settings that its weights were saved with"):
        LatentActionQuantizer.from_pretrained(tmp_path)
    config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(ValueError, match="expected the settings and weights of one"):
        LatentActionQuantizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"these are no weights, but a text of some length"),
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[1]"),
        ("config.json", b'{"codebook_size": "8"}'),
    ],
)
def test_a_folder_with_a_damaged_file_is_refused(tmp_path: Path, file, content):
    make_laq().save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:-8] if content is None else content)
    with pytest.raises(ValueError, match=r"LAQ: expected the settings and weights of one in .* got .*Next step"):
        LatentActionQuantizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere/at/all", "model.safetensors"])
def test_what_is_no_laq_at_all_is_refused(tmp_path: Path, name):
    """Neither a folder nor a name that the Hub could have."""
    (tmp_path / "model.safetensors").touch()
    reason = "which is a file" if name == "model.safetensors" else "which is no folder"
    with pytest.raises(ValueError, match=rf"LAQ: expected the folder .* got .*{name}, {reason}.*Next step: give"):
        LatentActionQuantizer.from_pretrained(tmp_path / name)


def test_an_unknown_schema_is_refused(tmp_path: Path):
    make_laq().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(ValueError, match="schema version 1, got 9"):
        LatentActionQuantizer.from_pretrained(tmp_path)


def test_the_hash_follows_the_weights():
    laq = make_laq()
    before = laq.weights_hash()
    assert before == make_laq().weights_hash()
    with torch.no_grad():
        next(laq.parameters()).add_(1e-3)
    assert laq.weights_hash() != before


def test_the_hash_is_that_of_the_settings_and_the_plain_bytes_of_the_weights():
    laq = make_laq(quantizer="vq")
    slow = hashlib.sha256(json.dumps(asdict(laq.config), sort_keys=True).encode())
    for name, tensor in sorted(laq.state_dict().items()):
        slow.update(name.encode() + tensor.numpy().tobytes())
    assert laq.weights_hash() == slow.hexdigest()


def test_rounded_weights_have_a_hash_of_their_own():
    laq = make_laq().bfloat16()
    before = laq.weights_hash()
    assert before not in (make_laq().weights_hash(), make_laq().half().weights_hash())
    assert before == make_laq().bfloat16().weights_hash()
    with torch.no_grad():
        next(laq.parameters()).add_(1)
    assert laq.weights_hash() != before


def test_laq_and_table_provide_codes_alike():
    laq = make_laq()
    frames = random_frames(6)
    codes, valid = laq.provide_codes(frames=frames)
    header = CodeTableHeader(
        dataset_id="a/b",
        dataset_fingerprint="f",
        camera="top",
        frame_gap=laq.frame_gap,
        num_frames=2,
        codebook_size=8,
        code_seq_len=4,
        laq_id="laq",
        laq_hash=laq.weights_hash(),
    )
    table = CodeTable(codes, valid, header)
    providers: list[CodeProvider] = [laq, table]
    index = torch.tensor([4, 1])
    for provider in providers:
        assert (provider.codebook_size, provider.code_seq_len, provider.frame_gap) == (8, 4, 3)
        again, all_valid = provider.provide_codes(index=index, frames=frames[index])
        assert torch.equal(again, codes[index])
        assert bool(all_valid.all())
        with pytest.raises(ValueError, match=r"expected .* got None. Next step"):
            provider.provide_codes()


@pytest.mark.parametrize("side", [24, 12, (20, 44)], ids=["smaller", "larger", "oblong"])
def test_resizing_bytes_equals_resizing_floats_to_one_grey_level(side):
    height, width = side if isinstance(side, tuple) else (side, side)
    frames = random_frames(4, side=max(height, width))[:, 0, :height, :width]
    images = frames.permute(0, 3, 1, 2)
    slow = F.interpolate(images.float(), (16, 16), mode="bilinear", antialias=True).round()
    fast = resize_images(images, 16)
    assert fast.dtype == torch.uint8
    assert (fast.float() - slow).abs().max() <= 1
    one_by_one = torch.cat([resize_images(image[None], 16) for image in images])
    assert torch.equal(fast, one_by_one)
    assert resize_images(fast, 16) is fast
