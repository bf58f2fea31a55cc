from __future__ import annotations

import pytest
import torch

from lerobot_hlrp import devices
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
