"""Frames of a video in order, decoded by PyAV in one thread.

LeRobot's own `decode_video_frames` is made for a few frames at a time: it lets FFmpeg use every core for pictures this
small, keeps a tensor for each and copies them together. Whoever decodes a whole dataset while a model works on what was
decoded before pays for that twice. It is the reference that the tests hold this one equal to.

Shape legend: n frames, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def decode_in_order(path: Path, timestamps: Sequence[float], *, fps: float, tolerance_s: float) -> np.ndarray:
    """The frames `[n, H, W, 3]` uint8 that are nearest to these times.

    Args:
        timestamps: of neighbouring frames, in seconds: each is 1 / fps after the one before.
        tolerance_s: how far a frame may be from its time.

    Raises:
        ValueError: a video that cannot be read, or has no frame near one of the times.
    """
    wanted = np.asarray(timestamps)
    distance = np.full(len(wanted), tolerance_s)  # of the nearest frame so far
    found = np.zeros(len(wanted), dtype=bool)
    frames = np.empty(0)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise _damaged(path, "a video that FFmpeg can decode", "a file without pictures")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            seconds = float(stream.time_base)  # type: ignore[arg-type]  # a stream of a file has one
            container.seek(round(wanted[0] / seconds) - 1, stream=stream)  # to the key frame at or before
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time = frame.pts * seconds
                nearest = round((time - wanted[0]) * fps)
                if 0 <= nearest < len(wanted) and abs(time - wanted[nearest]) < distance[nearest]:
                    if not found.any():
                        frames = np.empty((len(wanted), frame.height, frame.width, 3), dtype=np.uint8)
                    frames[nearest] = frame.to_ndarray(format="rgb24")
                    distance[nearest], found[nearest] = abs(time - wanted[nearest]), True
                if time >= wanted[-1]:
                    break
    except av.FFmpegError as error:
        raise _damaged(path, "a video that FFmpeg can decode", str(error)) from error
    if not found.all():
        raise _damaged(path, f"a frame within {tolerance_s} s of {wanted[~found][0]:.4f} s", "none")
    return frames


def _damaged(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected}, got {got}. Next step: copy or download the dataset anew, or record it again."
    )
