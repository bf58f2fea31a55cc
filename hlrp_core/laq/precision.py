"""Codes are computed in float32, whatever precision surrounds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def in_float32(tensor: Tensor) -> Iterator[None]:
    """No autocast on the tensor's device, and no TF32. A policy that trains in bfloat16 asks for labels within its
    autocast, lerobot-train allows TF32, and rounded latents near the border of a code would give other ones than the
    code table of the same LAQ has."""
    with torch.autocast(tensor.device.type, enabled=False), _without_tf32():
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Matrix products and convolutions of a GPU in full float32; torch allows TF32 in convolutions unless told not to.

    torch has two sets of names for this. Where somebody has used the newer one (`fp32_precision`), the older one may
    not even be read; everywhere else the older one is written, so that both of them agree within.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        precision = torch.get_float32_matmul_precision()
        before = [(matmul, "allow_tf32", matmul.allow_tf32), (cudnn, "allow_tf32", cudnn.allow_tf32)]
        off: Any = False
    except RuntimeError:
        precision = None
        before = [(part, "fp32_precision", part.fp32_precision) for part in (matmul, cudnn.conv)]
        off = "ieee"
    for part, name, value in before:
        if value:  # what is off stays untouched: writing would make it a choice of its own in the newer names
            setattr(part, name, off)
    try:
        yield
    finally:
        for part, name, value in before:
            if value:
                setattr(part, name, value)
        if precision == "medium":  # which allow_tf32 alone would bring back as "high"
            torch.set_float32_matmul_precision(precision)
