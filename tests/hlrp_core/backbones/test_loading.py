"""A folder that is no complete checkpoint is an error that says what is missing, before anything is built on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hlrp_core.backbones.loading import load_core
from hlrp_core.backbones.model_core import save_processor
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint

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


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = {"qwen3_vl": "model.language_model.layers.1", "smolvlm": "model.text_model.layers.1"}


def test_weights_that_are_missing_are_named_and_not_left_at_random(checkpoint):
    family, folder = checkpoint
    absent = f"{LAYER[family]}.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights.pop(absent))
    with pytest.raises(ValueError, match=rf"backbone: expected weights.*1 missing \({absent}\).*{folder}.*Next step"):
        load_core(folder, family=family)


def test_a_layer_that_is_missing(checkpoint):
    family, folder = checkpoint

    def drop(weights):
        for name in [name for name in weights if name.startswith(f"{LAYER[family]}.")]:
            del weights[name]

    change_weights(folder, drop)
    with pytest.raises(ValueError, match=rf"got \d+ missing \({LAYER[family]}.*, \.\.\.\) and 0 of another shape"):
        load_core(folder, family=family)


def test_weights_of_another_shape(checkpoint):
    family, folder = checkpoint
    name = f"{LAYER[family]}.mlp.down_proj.weight"
    change_weights(folder, lambda weights: weights.update({name: weights[name][:, :-2].contiguous()}))
    with pytest.raises(
        ValueError, match=rf"0 missing \(-\) and 1 of another shape \({name} \(128, 382\) for \(128, 384\)"
    ):
        load_core(folder, family=family)


def test_a_projection_may_be_absent_where_it_is_tied_alone(checkpoint):
    family, folder = checkpoint
    change_weights(folder, lambda weights: weights.pop("lm_head.weight", None))
    if family == "smolvlm":  # a table of its own
        with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\)"):
            load_core(folder, family=family)
        return
    core = load_core(folder, family=family)
    assert core.lm_head.weight is core.model.get_input_embeddings().weight


def test_a_checkpoint_with_rows_of_its_own(checkpoint, tmp_path):
    """A model whose vocabulary has grown, saved by transformers; and more weights than the model has parts."""
    family, folder = checkpoint
    core = load_core(folder, family=family)
    num_rows = core.lm_head.weight.shape[0]
    core.grow_vocabulary(num_old=num_rows, new_ids=torch.arange(num_rows, num_rows + 10))
    core.model.save_pretrained(tmp_path / "grown")
    save_processor(core.processor, tmp_path / "grown")
    change_weights(tmp_path / "grown", lambda weights: weights.update({"value_head.weight": torch.zeros(1, 2)}))
    loaded = load_core(tmp_path / "grown", family=family)
    assert torch.equal(loaded.lm_head.weight, core.lm_head.weight)
    assert len(loaded.lm_head.weight) == num_rows + 10


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


@pytest.mark.parametrize("setting", [{"family": "qwen"}, {"size": "tny"}])
def test_no_checkpoint_of_an_unknown_family_or_size(setting, tmp_path):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"{name}: expected one of .*'{value}'\. Next step: .*Did you mean"):
        write_random_checkpoint(tmp_path / "new", **setting)
    assert not (tmp_path / "new").exists()
