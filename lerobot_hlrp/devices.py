"""The device that a command computes on, by the name that the user gave it."""

from __future__ import annotations

import torch

from hlrp_core.expectation import expect


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one there is.

    Raises:
        ValueError: no such device on this machine; those there are named.
    """
    if name is None:
        from lerobot.utils.device_utils import auto_select_torch_device

        return auto_select_torch_device()
    choices = list_devices()
    try:
        device = torch.device(name)
    except RuntimeError:  # no kind of device at all
        device = None
    expect(
        device is not None and str(device) in choices,
        "device",
        f"one of this machine's: {', '.join(choices)}",
        repr(name),
        "Choose one of these, or leave --device out for the best.",
    )
    assert device is not None
    return device


def list_devices() -> list[str]:
    """`cpu`, the accelerator's kind, and each accelerator by its number."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = str(torch.accelerator.current_accelerator())
    return ["cpu", kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]


def is_same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device: `cuda` is the current one."""
    return one.type == other.type and _index(one) == _index(other)


def _index(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.accelerator.current_device_index() if device.index is None else device.index
