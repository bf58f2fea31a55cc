"""Features of a frozen vision transformer as what a LAQ reconstructs (UniVLA, arXiv 2505.06111; DINO-WM, 2411.04983).

Features ignore much of what changes without meaning, such as light and texture.

Shape legend: B batch, R image side, P the transformer's patch side, Y = R / P, F feature channels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp_core.laq.config import LAQConfig


def with_feature_sizes(config: LAQConfig) -> LAQConfig:
    """The settings with `feature_shape` of their frozen encoder.

    Raises:
        ValueError: no such encoder, one that is no vision transformer, or one whose patches do not fit the image.
    """
    from transformers import AutoConfig

    name = config.feature_encoder
    assert name is not None
    try:
        encoder = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"laq.feature_encoder: expected the Hub id or folder of a vision transformer, got {name!r}, which cannot "
            f"be read ({str(error).splitlines()[0]}). Next step: check the name, or download the model first."
        ) from error
    if not hasattr(encoder, "patch_size") or not hasattr(encoder, "hidden_size"):
        raise ValueError(
            f"laq.feature_encoder: expected a vision transformer with one patch size, such as DINOv2, got {name!r} of "
            f"type {encoder.model_type!r}. Next step: use facebook/dinov2-small."
        )
    if config.image_size % encoder.patch_size:
        fitting = max(round(config.image_size / encoder.patch_size), 1) * encoder.patch_size
        raise ValueError(
            f"laq.image_size: expected a multiple of {encoder.patch_size} (the patches of {name!r}), got "
            f"{config.image_size}. Next step: set laq.image_size={fitting} and a laq.patch_size that divides it."
        )
    return replace(config, feature_shape=(encoder.hidden_size, config.image_size // encoder.patch_size))


class FeatureTarget:
    """The frozen encoder: images `[B, 3, R, R]` in [-1, 1] -> features `[B, F, Y, Y]`, each normalised."""

    def __init__(self, config: LAQConfig):
        from transformers import AutoImageProcessor, AutoModel

        name = config.feature_encoder
        assert name is not None
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(name)
        self.mean = torch.tensor(processor.image_mean)[:, None, None]
        self.std = torch.tensor(processor.image_std)[:, None, None]
        self.size = config.feature_shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.model.device != images.device:
            self.model.to(images.device)
        mean, std = self.mean.to(images), self.std.to(images)
        pixels = ((images + 1) / 2 - mean) / std
        hidden = self.model(pixel_values=pixels).last_hidden_state  # (B, prefix + Y * Y, F)
        patches = hidden[:, -(self.size**2) :]  # the class and register tokens come first
        features = F.layer_norm(patches.float(), patches.shape[-1:])
        return features.transpose(1, 2).unflatten(2, (self.size, self.size))
