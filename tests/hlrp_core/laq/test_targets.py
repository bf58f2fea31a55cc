"""A LAQ that reconstructs the features of a frozen encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizer import LatentActionQuantizer

SIDE, PATCH, WIDTH = 28, 14, 12


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory) -> Path:
    """A tiny DINOv2 with register tokens, of transformers' own class."""
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def settings(folder: Path, **changes) -> LAQConfig:
    values = {"image_size": SIDE, "patch_size": 4, "hidden_dim": 16, "num_layers": 1, "target": "features"}
    return LAQConfig(**{**values, "feature_encoder": str(folder), **changes})


@pytest.fixture
def laq(encoder_folder) -> LatentActionQuantizer:
    torch.manual_seed(0)
    return LatentActionQuantizer.for_training(settings(encoder_folder))


def frames(size: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 2, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def test_targets_are_the_encoders_patch_features(laq, encoder_folder):
    from transformers import AutoModel

    output = laq(frames())
    pixels = frames()[:, 1].permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    hidden = AutoModel.from_pretrained(encoder_folder).eval()(pixel_values=pixels).last_hidden_state
    expected = hidden[:, 5:]  # after the class token and four registers
    expected = (expected - expected.mean(-1, keepdim=True)) / expected.var(-1, keepdim=True, correction=0).add(
        1e-5
    ).sqrt()
    assert output.target.shape == (4, WIDTH, SIDE // PATCH, SIDE // PATCH)
    torch.testing.assert_close(output.target.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_the_frozen_encoder_neither_learns_nor_travels(laq, tmp_path):
    output = laq(frames())
    assert torch.equal(output.reconstruction, output.source)  # training starts at the copy
    output.loss.backward()
    assert laq.decoder.to_target.weight.grad.abs().sum() > 0
    target = laq._feature_target[0]
    assert not any(p.requires_grad or p.grad is not None for p in target.model.parameters())
    learnt = {id(p) for p in laq.parameters()}
    assert not any(id(p) in learnt for p in target.model.parameters())
    assert sum(v.numel() for v in laq.state_dict().values()) < 50_000


def test_labelling_needs_no_frozen_encoder(laq, tmp_path):
    codes = laq.encode(frames())
    laq.save_pretrained(tmp_path)
    loaded = LatentActionQuantizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(frames()), codes)
    with pytest.raises(ValueError, match="load_feature_encoder"):
        loaded(frames())
    loaded.load_feature_encoder()
    assert loaded.decode(frames()[:, 0], codes).shape == (4, WIDTH, SIDE // PATCH, SIDE // PATCH)


def test_patches_that_do_not_fit_are_refused(encoder_folder):
    with pytest.raises(ValueError, match=r"multiple of 14.*image_size=28"):
        LatentActionQuantizer.for_training(settings(encoder_folder, image_size=32, patch_size=4))


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"laq.feature_encoder.*check the name"):
        LatentActionQuantizer.for_training(settings(tmp_path))
