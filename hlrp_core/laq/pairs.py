"""Frame tuples (t, t+Δ, ...) of a video array: what a LAQ trains and is measured on.

Shape legend: N frames, M tuples, B batch, T frames of a tuple, H W image size, A action width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameTuples:
    """Args:
    frames: `[N, H, W, 3]` uint8, in memory or mapped from a file.
    starts: `[M]` positions of each tuple's frame t; the whole tuple lies in one episode.
    frame_gap: Δ.
    num_frames: T.
    motion: `[M, A]` float, what each tuple's actions do over its gap (their sum, say), normalised; NaN where they are
        not known, and None without actions.
    """

    frames: np.ndarray
    starts: np.ndarray
    frame_gap: int
    num_frames: int = 2
    motion: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, which: np.ndarray) -> Tensor:
        """Tuples `[B, T, H, W, 3]` uint8."""
        positions = self.starts[which][:, None] + self.frame_gap * np.arange(self.num_frames)  # (B, T)
        return torch.from_numpy(self.frames[positions])

    def sample(self, batch_size: int, *, seed: int, step: int, rank: int = 0) -> Tensor:
        """A random batch that depends on seed, step and process alone, so that a continued run reads what it would have
        read, and no process what another reads."""
        rng = np.random.default_rng([seed, step, rank] if rank else [seed, step])
        return self.read(rng.integers(len(self), size=batch_size))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All tuples in order."""
        for first in range(0, len(self), batch_size):
            yield self.read(np.arange(first, min(first + batch_size, len(self))))

    def spread(self, most: int) -> FrameTuples:
        """At most `most` tuples, evenly spaced."""
        if len(self) <= most:
            return self
        kept = np.linspace(0, len(self) - 1, most).round().astype(int)
        motion = None if self.motion is None else self.motion[kept]
        return FrameTuples(self.frames, self.starts[kept], self.frame_gap, self.num_frames, motion)


def tuple_starts(episode_lengths: list[int], *, frame_gap: int, num_frames: int = 2) -> list[np.ndarray]:
    """For each episode the positions, counted over all episodes, at which a whole tuple begins.

    Raises:
        ValueError: no episode is long enough.
    """
    span = frame_gap * (num_frames - 1)
    if max(episode_lengths, default=0) <= span:
        raise ValueError(
            f"frame_gap: expected a tuple of {num_frames} frames with gap {frame_gap} to fit into an episode, got "
            f"episodes of at most {max(episode_lengths, default=0)} frames. Next step: use a gap below "
            f"{max(episode_lengths, default=1) / max(num_frames - 1, 1):.0f}, or longer episodes."
        )
    firsts = np.concatenate([[0], np.cumsum(episode_lengths)[:-1]])
    return [first + np.arange(max(length - span, 0)) for first, length in zip(firsts, episode_lengths, strict=True)]
