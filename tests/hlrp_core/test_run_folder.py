from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hlrp_core.run_folder import (
    RunFolder,
    StopRequest,
    capture_random_state,
    load_optimizer,
    load_random_state,
    new_folder,
    restore_random_state,
    save_optimizer,
    save_random_state,
    write_json,
)

SETTINGS = {"steps": 10, "betas": (0.9, 0.95), "nested": {"a": None}}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "a" / "b") as scratch:
        (scratch / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "c"):
        raise RuntimeError
    with new_folder(tmp_path / "a" / "b") as scratch:  # replaces
        (scratch / "other").write_text("y")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["other"]


def test_json_is_replaced_in_one_go(tmp_path):
    write_json(tmp_path / "f.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "f.json", {"a": object()})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_are_null(value, tmp_path):
    data = {"a": [1.5, value], "b": {"c": (value, "x")}, "d": 2}
    write_json(tmp_path / "f.json", data)
    expected = {"a": [1.5, None], "b": {"c": [None, "x"]}, "d": 2}
    assert json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail) == expected
    run = RunFolder(tmp_path / "run", {"data": data})
    RunFolder(tmp_path / "run", {"data": data})
    run.log({"step": 1, "grad_norm": value})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "grad_norm": None}


def test_settings_that_an_earlier_version_wrote_with_infinity(tmp_path):
    RunFolder(tmp_path / "run", {"norm": 1.0})
    (tmp_path / "run" / "settings.json").write_text('{"norm": Infinity}')
    RunFolder(tmp_path / "run", {"norm": math.inf})


def test_continuing_needs_the_same_settings(tmp_path):
    RunFolder(tmp_path / "run", SETTINGS)
    RunFolder(tmp_path / "run", SETTINGS)
    with pytest.raises(ValueError, match=r"\(steps=10\), got steps=11.*Next step"):
        RunFolder(tmp_path / "run", {**SETTINGS, "steps": 11})
    with pytest.raises(ValueError, match="nested"):
        RunFolder(tmp_path / "run", {**SETTINGS, "nested": {"a": 1}})
    with pytest.raises(ValueError, match="lr=None"):
        RunFolder(tmp_path / "run", {**SETTINGS, "lr": 1})


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ValueError, match="new or empty"):
            RunFolder(folder, SETTINGS)
    assert (tmp_path / "mine").read_text() == "precious"


def test_settings_that_another_process_is_writing_are_no_other_files(tmp_path):
    """Each process of a run builds the folder; a killed one may leave its scratch file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".settings.json.4711.tmp").write_text("{")
    RunFolder(tmp_path / "run", SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".metrics.json.4711.tmp").write_text("{")
    with pytest.raises(ValueError, match="new or empty"):
        RunFolder(tmp_path / "other", SETTINGS)


@pytest.mark.parametrize("moment", ["exists", "iterdir"])
def test_a_folder_that_another_process_of_the_run_makes_meanwhile(tmp_path, monkeypatch, moment):
    """The other one makes it just after this one has asked whether it exists, or just before its files are listed."""
    asked, folder = getattr(Path, moment), tmp_path / "run"
    if moment == "iterdir":
        folder.mkdir()

    def ask(path):
        if path != folder:
            return asked(path)
        monkeypatch.undo()
        found = asked(path) if moment == "exists" else None
        RunFolder(folder, SETTINGS)
        (folder / "metrics.jsonl").write_text("")
        return asked(path) if found is None else found

    monkeypatch.setattr(Path, moment, ask)
    RunFolder(folder, SETTINGS)
    assert (folder / "metrics.jsonl").is_file()
    with pytest.raises(ValueError, match="expected the settings"):
        RunFolder(folder, {**SETTINGS, "steps": 11})


def test_processes_that_write_the_same_file_do_not_meet(tmp_path, monkeypatch):
    """On several machines their process numbers may be equal: here the other one writes between write and rename."""
    rename = Path.replace

    def overtaken(path, target):
        monkeypatch.undo()
        write_json(tmp_path / "f.json", {"a": 1})
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    write_json(tmp_path / "f.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_checkpoints(tmp_path):
    run = RunFolder(tmp_path / "run", SETTINGS, keep=2)
    assert run.latest_checkpoint() is None
    for step in (5, 10, 15):
        with run.new_checkpoint(step) as folder:
            (folder / "step").write_text(str(step))
    with pytest.raises(RuntimeError), run.new_checkpoint(20):
        raise RuntimeError("killed")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["000010", "000015", "last"]
    assert run.latest_checkpoint().name == "000015"
    assert (run.last / "step").read_text() == "15"
    assert os.readlink(run.last) == "000015"  # relative: the run may be moved
    every = RunFolder(tmp_path / "all", SETTINGS)
    for step in range(1, 5):
        with every.new_checkpoint(step):
            pass
    assert len(list((tmp_path / "all" / "checkpoints").iterdir())) == 5


def test_the_link_to_the_newest_checkpoint_is_repaired(tmp_path):
    run = RunFolder(tmp_path / "run", SETTINGS)
    run.repair_last()
    assert not run.last.is_symlink()  # there is none to point to
    for step in (5, 10):
        with run.new_checkpoint(step):
            pass
    run.last.unlink()
    for stale in ("none", "000005", "000007"):  # killed after the first, after a later one; its folder deleted since
        if stale != "none":
            run.last.unlink()
            run.last.symlink_to(stale)
        run.repair_last()
        assert os.readlink(run.last) == "000010"
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["000005", "000010", "last"]
    run.last.unlink()
    run.last.mkdir()  # as some ways of copying leave it
    run.repair_last()
    assert run.last.is_dir()
    assert not run.last.is_symlink()


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    run = RunFolder(tmp_path / "run", SETTINGS)
    run.forget_after(0)
    for step in range(1, 6):
        run.log({"step": step, "loss": 0.1 * step})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run.forget_after(3)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def build() -> tuple:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    return model, torch.optim.AdamW(groups, lr=0.1)


def test_optimizer_and_random_numbers_continue_exactly(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 3)
    save_optimizer(optimizer, tmp_path)
    save_random_state(capture_random_state(), tmp_path)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train(model, optimizer, 3)
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002

    other, second = build()
    other.load_state_dict(weights)
    load_optimizer(second, tmp_path)
    restore_random_state(load_random_state(tmp_path))
    train(other, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn  # noqa: NPY002
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}  # no pickle


class FakeCUDA:
    """Of several devices, one of them the process's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_devices: int, current: int):
        self.states = [torch.full((16,), 10 + device, dtype=torch.uint8) for device in range(num_devices)]
        self.current = current
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": self.states[self.index(device)])
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)
        for name in ("get_rng_state_all", "set_rng_state_all"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("not the other processes' devices"))

    def index(self, device) -> int:
        found = torch.device(device).index if not isinstance(device, int) else device
        return self.current if found is None else found

    def set(self, state: torch.Tensor, device="cuda") -> None:
        self.states[self.index(device)] = state


@pytest.mark.parametrize(("num_devices", "current"), [(4, 2), (2, 1), (1, 0), (0, 0)])
def test_random_numbers_of_the_current_cuda_device_alone(num_devices, current, tmp_path, monkeypatch):
    """The run may continue with fewer devices in sight, or without any."""
    FakeCUDA(monkeypatch, num_devices=4, current=2)
    save_random_state(capture_random_state(), tmp_path)
    cuda = FakeCUDA(monkeypatch, num_devices=num_devices, current=current)
    before = list(cuda.states)
    restore_random_state(load_random_state(tmp_path))
    for device, state in enumerate(cuda.states):
        assert torch.equal(state, before[device]) or device == current
    assert not cuda.states or int(cuda.states[current][0]) == 12


def test_random_numbers_of_a_run_that_saw_no_cuda_device(tmp_path, monkeypatch):
    FakeCUDA(monkeypatch, num_devices=0, current=0)
    save_random_state(capture_random_state(), tmp_path)
    cuda = FakeCUDA(monkeypatch, num_devices=1, current=0)
    restore_random_state(load_random_state(tmp_path))
    assert int(cuda.states[0][0]) == 10


def test_random_numbers_of_all_devices_as_an_earlier_version_wrote_them(tmp_path):
    state = capture_random_state()
    save_random_state(state, tmp_path)
    save_file({"torch": state["torch"], "cuda/0": state["torch"].clone()}, tmp_path / "random.safetensors")
    with pytest.raises(ValueError, match=r"expected the random states torch and cuda, got cuda/0.*Next step"):
        load_random_state(tmp_path)


def test_an_optimizer_that_has_not_stepped(tmp_path):
    _, optimizer = build()
    save_optimizer(optimizer, tmp_path)
    _, other = build()
    load_optimizer(other, tmp_path)
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_is_a_request_and_the_second_acts(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_outside_its_block_interrupts_are_as_ever():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with StopRequest():
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
