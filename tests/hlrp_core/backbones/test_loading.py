"""A folder that is no complete checkpoint is an error that says what is missing, before anything is built on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hlrp_core.backbones.loading import load_core

FAMILIES = ["qwen3_vl", "smolvlm"]


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tiny_backbone: Callable, tmp_path: Path) -> tuple[str, Path]:
    """A family, and a copy of its checkpoint to be damaged."""
    return request.param, Path(shutil.copytree(tiny_backbone(request.param), tmp_path / "copy"))


def remove(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["tokenizer*"], "processor|tokenizer"),
        (["tokenizer.json"], "processor|tokenizer"),
        (["processor_config.json"], r"processor \(tokenizer\.json"),
        (["tokenizer*", "processor_config.json", "chat_template.json"], r"processor \(tokenizer\.json"),
        (["*.safetensors"], r"weights \(model\.safetensors\)"),
    ],
)
def test_missing_files(patterns, expected, checkpoint):
    family, folder = checkpoint
    load_core(folder, family=family)
    remove(folder, *patterns)
    with pytest.raises(ValueError, match=rf"backbone: expected .*({expected}).*{folder}.*Next step: copy"):
        load_core(folder, family=family)


def test_truncated_weights(checkpoint):
    family, folder = checkpoint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"backbone: expected .*weights.*Next step.*SafetensorError"):
        load_core(folder, family=family)


def test_a_tokenizer_without_padding_token(checkpoint):
    family, folder = checkpoint
    remove(folder, "tokenizer_config.json")
    if family == "qwen3_vl":  # its class has one
        load_core(folder, family=family)
        return
    with pytest.raises(ValueError, match=r"backbone: expected .*a padding token.*padding token None.*Next step"):
        load_core(folder, family=family)


def test_the_tokenizer_of_another_model(checkpoint, tiny_backbone):
    """The image token has another number there."""
    family, folder = checkpoint
    other = next(name for name in FAMILIES if name != family)
    for path in tiny_backbone(other).glob("tokenizer*"):
        shutil.copy(path, folder)
    with pytest.raises(ValueError, match=r"backbone: expected .*(image token|processor).*Next step"):
        load_core(folder, family=family)


def test_an_unknown_dtype(checkpoint):
    family, folder = checkpoint
    with pytest.raises(ValueError, match=r"dtype: expected one of float32.*got 'int8'\. Next step"):
        load_core(folder, family=family, dtype="int8")
    assert load_core(folder, family=family, dtype="bfloat16").model.dtype == torch.bfloat16
