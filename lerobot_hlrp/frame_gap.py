"""Δ in seconds, and in the frames of a dataset: 0.3 s are 3 frames at 10 frames per second and 6 at 20."""

from __future__ import annotations

import math

from hlrp_core.expectation import expect


def frames_apart(seconds: float, fps: float, dataset: str) -> int:
    """How many frames of a dataset lie so far apart.

    Args:
        dataset: its name, for the message.

    Raises:
        ValueError: it is no whole number of frames, within a twentieth of a frame.
    """
    frames = round(seconds * fps)
    near = [n for n in (math.floor(seconds * fps), math.ceil(seconds * fps)) if n >= 1] or [1]
    choices = " or ".join(f"{n / fps:.6g}" for n in near)
    expect(
        seconds * fps >= 0.95 and abs(seconds * fps - frames) <= 0.05,
        "frame_gap_s",
        f"a whole number of frames, 1 or more, of {dataset} at {fps:g} frames per second",
        f"{seconds:g} s, which are {seconds * fps:.3g} frames",
        f"Use {choices} s.",
    )
    return frames


def is_same_time(one: float, other: float) -> bool:
    """Whether two times in seconds are equal but for rounding, within a hundredth."""
    return math.isclose(one, other, rel_tol=0.01)
