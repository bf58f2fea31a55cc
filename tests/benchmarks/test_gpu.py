"""benchmarks/gpu.py on a CPU and a tiny backbone: what it writes, its floors, and what does not fit into memory."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hlrp_core.backends.fake_batch import fake_batch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHANGES = {"COMPILER": "eager", "CODES": ((2, 4),)}  # traces as the real compiler does, and generates no code
# In a process of its own: one that has compiled cannot be forked by other tests any more.
PROGRAM = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; vars(gpu).update({CHANGES!r}); gpu.main()"


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        module = importlib.import_module("gpu")
        for name, value in CHANGES.items():
            patch.setattr(module, name, value)
        yield module


@pytest.fixture(scope="module")
def backbone(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights."""
    folder = tmp_path_factory.mktemp("backbone") / "no-weights"
    shutil.copytree(tiny_qwen, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def result(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("results") / "gpu.json"
    flags = ["--device=cpu", "--compile", "--image_size=32", "--batch_sizes", "1", "2", "--training_batch_size=2"]
    flags += ["--probe_mb=4", "--probe_side=64", "--rounds=2", f"--backbone={backbone}", f"--output={output}"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def test_every_measure_is_written(result):
    assert result["rates"].keys() == {"bytes_per_s", "operations_per_s"}
    assert [(row["batch"], row["S"], row["K"], row["forwards"]) for row in result["codes"]] == [
        (1, 2, 4, 2),
        (2, 2, 4, 2),
    ]
    assert (result["chunk"]["chunk"], result["chunk"]["flow_steps"], result["chunk"]["forwards"]) == (50, 10, 11)
    for row in (*result["codes"], result["chunk"]):
        assert {"whole_ms", "floor_ms", "compiled_ms", "hardware_ms", "whole_over_floor"} <= row.keys()
    assert all("constrained_ms" in row and row["compiled_equal_share"] == 1 for row in result["codes"])
    training = result["training"]
    for name in ("ours", "full", "compiled"):
        assert {f"{name}_ms", f"{name}_samples_per_s", f"{name}_peak_mb", f"{name}_over_hardware"} <= training.keys()
        assert training[f"{name}_peak_mb"] > training["state_mb"] * 0.7  # weights and moments, at least


def test_ratios_are_those_of_the_times(result):
    for row in (*result["codes"], result["chunk"], result["training"]):
        assert row["hardware_ms"] > 0
        for key in (key for key in row if "_over_" in key):
            name, floor = key.split("_over_")
            # the floors are rounded too
            assert row[key] == pytest.approx(row[f"{name}_ms"] / row[f"{floor}_ms"], rel=0.02, abs=0.01), key
    training = result["training"]
    assert training["hardware_ms"] == pytest.approx(training["arithmetic_ms"] + training["update_ms"], abs=0.001)
    assert training["ours_samples_per_s"] == pytest.approx(2e3 / training["ours_ms"], rel=0.01)


def test_work_is_that_of_the_linear_layers(gpu, make_tiny_backend):
    backend = make_tiny_backend()
    inputs = backend._prompt(fake_batch(backend, batch_size=3), for_prediction=True)
    with torch.no_grad():
        prefill, *steps = gpu.count_work(lambda: gpu.run_floor(backend, inputs), backend)
    layers = [x for x in backend.core.model.model.language_model.modules() if isinstance(x, nn.Linear)]
    num_weights = sum(layer.weight.numel() for layer in layers)
    assert steps == [[4 * num_weights, 2 * 3 * num_weights]] * 3
    assert prefill[0] > 4 * num_weights  # vision, too
    assert prefill[1] > 2 * inputs.tokens.ids.numel() * num_weights
    assert not any(layer._forward_hooks for layer in layers)


def test_what_does_not_fit_is_null(gpu, backbone, monkeypatch):
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "full_logits_loss", fail)
    args = Namespace(backbone=backbone, shape="own", device="cpu", compile=False, image_size=32, rounds=1)
    args.training_batch_size = 1
    figures = gpu.measure_training(args, {"bytes_per_s": 1e9, "operations_per_s": 1e9})
    assert figures["full_ms"] is figures["full_samples_per_s"] is figures["full_peak_mb"] is None
    assert figures["ours_ms"] > 0 and figures["ours_peak_mb"] > 0


def test_the_2b_shape_is_that_of_the_published_model(gpu, real_processor: Callable[[str], Path]):
    model = gpu.build_model(real_processor("qwen3_vl"), "2b", device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 2_127_532_032


def test_a_processor_of_another_shape_is_refused(gpu, backbone):
    args = Namespace(backbone=backbone, shape="2b", device="meta")
    with pytest.raises(ValueError, match=r"patches of 16 pixels, as the shape has, got one with 12.*Next step"):
        gpu.build(args, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_to_do(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "expected a GPU, got none. Next step: --device=cpu" in capsys.readouterr().err
