"""From a folder or Hub id to a ModelCore of the right family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, PretrainedConfig

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.qwen3_vl import Qwen3VLCore
from hlrp_core.backbones.smolvlm import SmolVLMCore

CORES: dict[str, type[ModelCore]] = {core.family: core for core in (Qwen3VLCore, SmolVLMCore)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_core(
    backbone: str | Path,
    *,
    family: str,
    image_size: int | None = None,
    image_splitting: bool = False,
    dtype: str = "float32",
) -> ModelCore:
    """Load weights and processor through transformers' own classes.

    Raises:
        ValueError: no such folder, a checkpoint of another family, an unknown dtype, or image settings that do not fit
            the family.
    """
    config = _load_config(backbone, family)
    images = _image_settings(family, image_size, image_splitting)
    model_class = getattr(transformers, CORES[family].model_class)
    model = model_class.from_pretrained(backbone, config=config, dtype=_dtype(dtype))
    return CORES[family](model, AutoProcessor.from_pretrained(backbone), **images)


def build_core(
    folder: str | Path,
    *,
    family: str,
    image_size: int | None = None,
    image_splitting: bool = False,
    dtype: str = "float32",
) -> ModelCore:
    """A core of the architecture and processor in `folder`, without weights: for loading a saved backend."""
    config = _load_config(folder, family)
    images = _image_settings(family, image_size, image_splitting)
    model_class = getattr(transformers, CORES[family].model_class)
    # not `.to(dtype)`: that would round buffers such as rotary frequencies, which `from_pretrained` keeps in float32
    model = model_class._from_config(config, dtype=_dtype(dtype))
    return CORES[family](model, AutoProcessor.from_pretrained(folder), **images)


def _image_settings(family: str, image_size: int | None, image_splitting: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"image_size": image_size}
    if image_splitting:
        if not issubclass(CORES[family], SmolVLMCore):
            raise ValueError(
                f"image_splitting: expected False with a backbone of the {family} family, which takes an image in one "
                "piece, got True. Next step: leave it out; a larger image_size shows more of an image."
            )
        settings["image_splitting"] = True
    return settings


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _load_config(backbone: str | Path, family: str) -> PretrainedConfig:
    if Path(backbone).is_absolute() and not Path(backbone).is_dir():
        raise ValueError(
            f"backbone: expected a folder with a Hugging Face checkpoint or a Hub id, got {backbone}, which is no "
            "folder. Next step: check the path, or make a checkpoint with hlrp-backbone."
        )
    try:
        config = AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone: expected a Hub id or a folder with the config.json of a {family} checkpoint, got {backbone}. "
            "Next step: check the name and the network, or make a checkpoint with hlrp-backbone. "
            f"(transformers says: {str(error).splitlines()[0]})"
        ) from error
    expected = CORES[family].model_types
    if config.model_type not in expected:
        raise ValueError(
            f"backbone: expected a checkpoint of the {family} family (model_type {' or '.join(expected)}), got "
            f"model_type '{config.model_type}' in {backbone}. Next step: choose the policy type or backend of that "
            "family, or another checkpoint."
        )
    return config
