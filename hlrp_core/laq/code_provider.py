"""What can say which codes a frame tuple has."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class CodeProvider(Protocol):
    """Yields codes for frame tuples (t, t+Δ, ...): a LAQ reads the frames, a code table looks their place up.

    Shape legend: B batch, T frames in time, S codes of a label.
    """

    @property
    def codebook_size(self) -> int: ...

    @property
    def code_seq_len(self) -> int:
        """S."""
        ...

    @property
    def frame_gap(self) -> int:
        """Δ in dataset frames."""
        ...

    def provide_codes(self, *, index: Tensor | None = None, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes `[B, S]` long, and `[B]` bool whether they may supervise.

        Args:
            index: `[B]` global index of each frame t in its dataset.
            frames: `[B, T, H, W, 3]` uint8.

        Raises:
            ValueError: the one that this provider needs is missing or does not fit.
        """
        ...
