"""Code accuracy, and the constant prediction that it must beat.

Shape legend: B batch, S code positions, K codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    @classmethod
    def total(cls, counts: Sequence[CodeCounts], codebook_size: int, code_seq_len: int) -> CodeCounts:
        """Of several counts together."""
        together = cls(codebook_size, code_seq_len)
        for one in counts:
            together.counts += one.counts
        return together

    def state(self) -> list[list[int]]:
        """JSON, for `from_state`."""
        return self.counts.tolist()

    @classmethod
    def from_state(cls, state: list[list[int]]) -> CodeCounts:
        counts = cls(codebook_size=len(state[0]), code_seq_len=len(state))
        counts.counts = torch.tensor(state)
        return counts

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
