"""Linear layers that run oneDNN's kernel on a CPU wherever no gradient is wanted: in prediction, and in what is frozen.

torch multiplies float32 matrices with MKL, which leaves AVX-512 unused on AMD's processors; oneDNN, which torch ships
beside it for convolutions, uses it: about half the time there, and about the same on Intel's. The operator is the one
that torch's own compiler puts in the place of linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Below this many multiplications the operator's own overhead is larger than what the kernel saves.
_LEAST_WORK = 1_500_000
_IS_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def speed_up_linears(module: nn.Module) -> None:
    """Let every plain linear layer in `module` choose its kernel; parameters, state dict and results stay its own."""
    if not _IS_AVAILABLE:
        return
    for part in module.modules():
        if type(part) is nn.Linear:  # subclasses have a reason to be one
            part.__class__ = CPULinear  # as in `qwen3_vl_vision`: survives deepcopy and keeps the state dict


class CPULinear(nn.Linear):
    """`nn.Linear`, by oneDNN where that is possible and worth it."""

    def forward(self, input: Tensor) -> Tensor:
        if self._fits(input):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return super().forward(input)

    def _fits(self, input: Tensor) -> bool:
        bias_learns = self.bias is not None and self.bias.requires_grad
        return (
            input.numel() * self.out_features >= _LEAST_WORK
            and input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and not (torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad or bias_learns))
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )
