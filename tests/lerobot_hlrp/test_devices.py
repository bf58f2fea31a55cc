from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.default import DatasetConfig

from lerobot_hlrp import devices
from lerobot_hlrp.cli import train_codes
from lerobot_hlrp.devices import choose_device, is_same_device, list_devices


@pytest.mark.parametrize("name", ["cudaa", "", "meta", "cuda:99", "cpu:3"])
def test_what_this_machine_has_not_is_refused(name):
    with pytest.raises(ValueError, match=r"device: expected one of this machine's: cpu.*Next step"):
        choose_device(name)


def test_what_it_has():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type in list_devices()
    for name in list_devices():
        assert str(choose_device(name)) == name


def test_cuda_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    cuda, first, second = (torch.device(name) for name in ("cuda", "cuda:0", "cuda:1"))
    assert is_same_device(cuda, second)
    assert not is_same_device(cuda, first)
    assert not is_same_device(cuda, torch.device("cpu"))
    assert is_same_device(torch.device("cpu"), torch.device("cpu"))


def test_accelerators_have_numbers(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices.list_devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cpu, cuda, cuda:0, cuda:1"):
        choose_device("cuda:2")


# -- hlrp-train-codes, which computes where accelerate says -----------------------------------------------------------


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_command(**settings) -> train_codes.TrainCodesCommand:
    return train_codes.TrainCodesCommand(
        dataset=DatasetConfig("test/tiny"), backbone="backbone", output_dir=Path("run"), **settings
    )


def test_devices_that_this_machine_has_not(fresh_accelerator):
    for name in ("cudaa", "cuda:99"):
        with pytest.raises(ValueError, match=rf"device: expected one of this machine's: cpu.*got '{name}'.*Next step"):
            train_codes.open_accelerator(make_command(device=name))


def test_a_device_is_honoured(fresh_accelerator, monkeypatch):
    assert train_codes.open_accelerator(make_command(device="cpu")).device == torch.device("cpu")
    current = [0]
    fake = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cuda"),
        "device_count": lambda: 2,
        "current_device_index": lambda: current[0],
        "set_device_index": lambda index: current.__setitem__(0, index),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.accelerator, name, function)
    made = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    monkeypatch.setattr("hlrp_core.training.code_training.make_accelerator", lambda *_, **__: made)
    assert train_codes.open_accelerator(make_command(device="cuda:1")) is made
    assert current == [1]  # what `cuda` means from now on
    for device, num_processes, wanted in (("cpu", 1, "cuda"), ("cuda:0", 2, "cuda:1"), ("cuda:0", 1, "cpu")):
        made.device, made.num_processes = torch.device(device), num_processes
        with pytest.raises(ValueError, match=rf"device: expected {device}, which accelerate has.*got {wanted}\. Next"):
            train_codes.open_accelerator(make_command(device=wanted))
    made.device, made.num_processes = torch.device("cuda:1"), 2
    current[0] = 0
    assert train_codes.open_accelerator(make_command(device="cuda")) is made
