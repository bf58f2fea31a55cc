"""From a folder or Hub id to a ModelCore of the right family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PretrainedConfig, ProcessorMixin

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
        ValueError: no such folder, files or weights that are missing there, a checkpoint of another family, an unknown
            dtype, or image settings that do not fit the family.
    """
    config = _load_config(backbone, family)
    images = _image_settings(family, image_size, image_splitting)
    processor = _load_processor(backbone, config)  # first: it is read faster than weights
    model_class = getattr(transformers, CORES[family].model_class)
    try:
        model, report = model_class.from_pretrained(
            backbone,
            config=config,
            dtype=_dtype(dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"backbone: expected a Hub id or a folder with weights (model.safetensors), got {backbone}, where none can "
            "be read. Next step: copy or download it anew, or make a checkpoint with hlrp-backbone. "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    _check_complete(backbone, report)
    return CORES[family](model, processor, **images)


def _check_complete(backbone: str | Path, report: dict[str, Any]) -> None:
    """Args:
        report: of `from_pretrained`. It lists no tied weights, which a checkpoint holds once.

    Raises:
        ValueError: some of the model's weights were not read. transformers leaves these at random.
    """
    missing = sorted(report["missing_keys"])
    misfits = sorted(f"{name} {tuple(got)} for {tuple(wanted)}" for name, got, wanted in report["mismatched_keys"])
    if missing or misfits:
        raise ValueError(
            "backbone: expected weights for every part of the model that its config.json describes, got "
            f"{len(missing)} missing ({_brief(missing)}) and {len(misfits)} of another shape ({_brief(misfits)}) in "
            f"{backbone}. Next step: copy or download it anew, with config.json and weights from one checkpoint."
        )


def _brief(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "-"


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
    return CORES[family](model, _load_processor(folder, config), **images)


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
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}. Next step: choose one of these.")
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
            f"(transformers says: {_first_line(error)})"
        ) from error
    expected = CORES[family].model_types
    if config.model_type not in expected:
        raise ValueError(
            f"backbone: expected a checkpoint of the {family} family (model_type {' or '.join(expected)}), got "
            f"model_type '{config.model_type}' in {backbone}. Next step: choose the policy type or backend of that "
            "family, or another checkpoint."
        )
    return config


def _load_processor(backbone: str | Path, config: PretrainedConfig) -> ProcessorMixin:
    """The checkpoint's processor.

    Raises:
        ValueError: a part of it is missing. transformers makes an empty tokenizer where there are no files of one.
    """
    files = "tokenizer.json, tokenizer_config.json and processor_config.json or preprocessor_config.json"
    next_step = "Next step: copy the processor's files from the checkpoint that the weights come from."
    try:
        processor = AutoProcessor.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone: expected a Hub id or a folder with a processor ({files}), got {backbone}, where it is "
            f"incomplete. {next_step} (transformers says: {_first_line(error)})"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"backbone: expected a Hub id or a folder with a processor ({files}), got a {type(processor).__name__} "
            f"alone in {backbone}. {next_step}"
        )
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    image_token = getattr(processor, "image_token", None)
    image_id = tokenizer.get_vocab().get(image_token)
    if image_id != config.image_token_id or tokenizer.pad_token_id is None:
        raise ValueError(
            f"backbone: expected the model's tokenizer, with the image token {image_token!r} as number "
            f"{config.image_token_id} and a padding token, got one of {len(tokenizer)} tokens in {backbone}, with "
            f"number {image_id} and padding token {tokenizer.pad_token!r}. {next_step}"
        )
    return processor


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
