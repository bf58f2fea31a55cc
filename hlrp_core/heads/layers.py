"""Layers that the action heads share.

Shape legend: B batch, N tokens, S code positions, K codebook size, H width, D width of a LAQ's code vector.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Periods of the time embedding, in units of the whole path (pi0's).
_MIN_PERIOD, _MAX_PERIOD = 4e-3, 4.0


def rms_norm(x: Tensor) -> Tensor:
    """Unit root mean square over the last axis. No weight: a linear layer or a modulation always follows."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def build_dropout(rate: float) -> nn.Module:
    return nn.Dropout(rate) if rate > 0 else nn.Identity()  # nn.Dropout(0) still costs a kernel in training


def init_near_zero(layer: nn.Linear) -> None:
    """A tenth of the usual initial weights, for the last layer of a branch; bias 0."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class GatedMLP(nn.Module):
    """SwiGLU, with both input projections in one matrix."""

    def __init__(self, dim: int, inner_dim: int):
        super().__init__()
        self.gate_and_up = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.down = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class CodeEmbedding(nn.Module):
    """Codes as tokens: `[B, S, K]` -> `[B, S, H]`, the expected entry of a table plus the position's vector."""

    def __init__(self, codebook_size: int, code_seq_len: int, dim: int):
        super().__init__()
        self.dim = dim
        self.table = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)
        self.positions = nn.Parameter(torch.randn(code_seq_len, dim) * dim**-0.5)

    def forward(self, code_probs: Tensor) -> Tensor:
        return code_probs.to(self.table.dtype) @ self.table + self.positions


class VectorEmbedding(nn.Module):
    """Code vectors as tokens: `[B, S, D]` -> `[B, S, H]`, projected, plus the position's vector."""

    def __init__(self, code_vector_dim: int, code_seq_len: int, dim: int):
        super().__init__()
        self.dim = dim
        self.projection = nn.Linear(code_vector_dim, dim)
        self.positions = nn.Parameter(torch.randn(code_seq_len, dim) * dim**-0.5)

    def forward(self, code_vectors: Tensor) -> Tensor:
        return self.projection(code_vectors.to(self.projection.weight.dtype)) + self.positions


class TimeEmbedding(nn.Module):
    """Flow times `[N]` as vectors `[N, H]`: sines and cosines in float32, then a small MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.layer_in = nn.Linear(dim, dim)
        self.layer_out = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        # Made here and not kept as a buffer: `module.to(bfloat16)` would round a buffer too.
        fraction = torch.linspace(0, 1, self.dim // 2, device=time.device, dtype=torch.float32)
        frequencies = 2 * math.pi / (_MIN_PERIOD * (_MAX_PERIOD / _MIN_PERIOD) ** fraction)
        phase = time.float()[:, None] * frequencies  # (N, H / 2)
        waves = torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.layer_in.weight.dtype)
        return F.silu(self.layer_out(F.silu(self.layer_in(waves))))
