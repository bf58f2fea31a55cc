"""Linear layers that run oneDNN's kernel on a CPU wherever no gradient is wanted: in prediction, and in what is frozen.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on AMD's processors; oneDNN, which torch ships
beside it for convolutions, uses it: about half the time there, and about the same on Intel's. The operator is the one
that torch's own compiler puts in the place of linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below this many multiplications the operator's own overhead is larger than what the kernel saves.
_LEAST_WORK = 1_500_000
_is_wanted = True
_IS_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def speed_up_linears(module: nn.Module) -> None:
    """Let every plain linear layer in `module` choose its kernel; parameters, state dict and results stay its own."""
    if not _IS_AVAILABLE:
        return
    for part in module.modules():
        if type(part) is nn.Linear:  # subclasses have a reason to be one
            part.__class__ = CPULinear  # as in `qwen3_vl_vision`: survives deepcopy and keeps the state dict


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Torch's own kernels meanwhile, for comparisons."""
    global _is_wanted
    before, _is_wanted = _is_wanted, False
    try:
        yield
    finally:
        _is_wanted = before


def fast_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` where no gradient is wanted, by the faster kernel."""
    if _fits(input, weight):
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return F.linear(input, weight, bias)


def _fits(input: Tensor, weight: Tensor) -> bool:
    return (
        input.numel() * len(weight) >= _LEAST_WORK
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and _IS_AVAILABLE
        and _is_wanted
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class CPULinear(nn.Linear):
    """`nn.Linear`, by oneDNN where that is possible and worth it."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self._needs_gradient(input):
            return super().forward(input)
        return fast_linear(input, self.weight, self.bias)

    def _needs_gradient(self, input: Tensor) -> bool:
        bias_learns = self.bias is not None and self.bias.requires_grad
        return input.requires_grad or self.weight.requires_grad or bias_learns
