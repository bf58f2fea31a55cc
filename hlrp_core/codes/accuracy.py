"""Code accuracy, and the constant prediction that it must beat.

Shape legend: B batch, S code positions, K codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class CodeCounts:
    """How often each code stood at each position: the constant baseline's whole knowledge."""

    def __init__(self, codebook_size: int, code_seq_len: int):
        self.counts = torch.zeros(code_seq_len, codebook_size, dtype=torch.long)

    def add(self, codes: Tensor) -> None:
        """Count codes `[B, S]`."""
        one = torch.ones(codes.T.shape, dtype=torch.long)
        self.counts.scatter_add_(1, codes.T.cpu(), one)

    @property
    def most_frequent(self) -> Tensor:
        """`[S]`: the best constant prediction for what was counted."""
        return self.counts.argmax(1)

    def constant_accuracy(self) -> float:
        """Share of the counted codes that the best constant prediction gets right."""
        total = int(self.counts.sum())
        return int(self.counts.max(1).values.sum()) / total if total else 0.0


def code_accuracy(predicted: Tensor, target: Tensor) -> float:
    """Share of code positions predicted right, of `[B, S]` both."""
    return (predicted == target).float().mean().item()
