"""A LAQ's own code vectors: fixed numbers that a head learns to predict or decodes, saved with it.

Heads see them *standardised*: centred at each position, and scaled by one number for all of them. A LAQ may have its
vectors anywhere and of any size, but how they lie to one another says what the codes mean.

Shape legend: B batch, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CodeVectors(nn.Module):
    """Codes as a LAQ's own vectors, standardised: `[B, S, K]` -> `[B, S, D]`, the expected one of each position.

    Args:
        codebook_size: K.
        code_seq_len: S.
        dim: D.
        owner: whose they are, for messages.
    """

    vectors: Tensor

    def __init__(self, codebook_size: int, code_seq_len: int, dim: int, *, owner: str):
        super().__init__()
        self.dim = dim
        self.owner = owner
        # NaN until set or loaded: a forgotten table must not pass for one
        self.register_buffer("vectors", torch.full((code_seq_len, codebook_size, dim), math.nan))

    def set_vectors(self, vectors: Tensor) -> None:
        """Take over `LatentActionQuantizer.code_vector_table()`, `[S, K, D]`.

        Raises:
            ValueError: another shape.
        """
        expected = tuple(self.vectors.shape)
        if vectors.shape != expected:
            raise ValueError(
                f"code vectors of {self.owner}: expected {list(expected)} (S, K, D), got {list(vectors.shape)}. "
                "Next step: take those of the LAQ that made the codes."
            )
        self.vectors.copy_(vectors.detach())

    def forward(self, code_probs: Tensor) -> Tensor:
        expected = torch.einsum("bsk,skd->bsd", code_probs.float(), self._standardized())
        return expected.to(self.vectors.dtype)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes `[B, S]` -> their standardised vectors `[B, S, D]` float32."""
        return lookup_vectors(codes, self._standardized())

    def standardize(self, vectors: Tensor) -> Tensor:
        """Vectors `[B, S, D]` in the LAQ's units -> standardised, float32."""
        return (vectors.float() - self._centre()) / self._scale()

    def restore(self, standardized: Tensor) -> Tensor:
        """Inverse of `standardize`."""
        return standardized.float() * self._scale() + self._centre()

    def nearest(self, standardized: Tensor) -> Tensor:
        """Standardised vectors `[B, S, D]` -> the codes `[B, S]` whose vectors are closest."""
        return nearest_codes(standardized, self._standardized())

    def mean_vectors(self, counts: Tensor) -> Tensor:
        """The standardised mean vector `[S, D]` of codes that were counted `[S, K]`."""
        return mean_vectors(counts, self._standardized())

    def _centre(self) -> Tensor:
        return self.vectors.float().mean(1)  # (S, D)

    def _scale(self) -> Tensor:
        centred = self.vectors.float() - self._centre()[:, None]  # (S, K, D)
        return centred.square().mean().sqrt().clamp(min=1e-6)

    def _standardized(self) -> Tensor:
        return (self.vectors.float() - self._centre()[:, None]) / self._scale()  # (S, K, D)


def lookup_vectors(codes: Tensor, table: Tensor) -> Tensor:
    """The vectors `[B, S, D]` of codes `[B, S]` in a table `[S, K, D]`."""
    return table[torch.arange(table.shape[0], device=codes.device), codes]


def nearest_codes(vectors: Tensor, table: Tensor) -> Tensor:
    """The codes `[B, S]` whose vectors in a table `[S, K, D]` are closest to `vectors` `[B, S, D]`."""
    distances = torch.cdist(
        vectors.transpose(0, 1), table, compute_mode="donot_use_mm_for_euclid_dist"
    )  # (S, B, K); by matrix products, near vectors would be told apart badly
    return distances.argmin(-1).T


def mean_vectors(counts: Tensor, table: Tensor) -> Tensor:
    """The mean vector `[S, D]` of codes that were counted `[S, K]`, by a table `[S, K, D]`: the best constant guess.

    Where nothing was counted, it is 0.
    """
    counts = counts.to(table)
    return torch.einsum("sk,skd->sd", counts / counts.sum(1, keepdim=True).clamp(min=1), table)


def hand_over_code_vectors(part: nn.Module | None, vectors: Tensor | None) -> None:
    """Give the new heads in `part` the LAQ's code vectors `[S, K, D]`, where they have any.

    Raises:
        ValueError: there are none for a head that has some, some where no head has any, or they do not fit.
    """
    tables = [module for module in part.modules() if isinstance(module, CodeVectors)] if part is not None else []
    for table in tables:
        if vectors is None:
            raise ValueError(
                f"code vectors of {table.owner}: expected those of the LAQ that made the codes, got None. "
                "Next step: pass code_vectors=laq.code_vector_table()."
            )
        table.set_vectors(vectors)
    if vectors is not None and not tables:
        raise ValueError(
            "code vectors: expected a code head that predicts them, or an action head that decodes them ('laq'), got "
            "neither. Next step: leave them out, or choose such a head."
        )
