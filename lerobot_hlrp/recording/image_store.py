"""Where a segment's frames wait to be written: as PNG bytes for the data file, or as PNG files for the encoder.

Both take frames (H, W, 3) uint8 with their number in the episode.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
from lerobot.datasets.utils import IMAGE_FILE_PATTERN
from lerobot.datasets.video_utils import encode_video_frames

# LeRobot's own levels: images stay in the dataset, a video's frames are read once and deleted.
_IMAGE_COMPRESSION, _VIDEO_COMPRESSION = 6, 1


class PngColumn:
    """Frames as rows of an image column: `{"bytes", "path"}`, as `datasets.Image` stores them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.num_bytes = 0

    def add(self, image: np.ndarray, frame_index: int) -> None:
        encoded = encode_png(image, _IMAGE_COMPRESSION)
        self.rows.append({"bytes": encoded, "path": IMAGE_FILE_PATTERN.format(frame_index=frame_index)})
        self.num_bytes += len(encoded)

    def clear(self) -> None:
        self.rows = []
        self.num_bytes = 0


class PngFolder:
    """Frames as numbered files, from which `encode` makes one video of the whole segment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clear()

    def add(self, image: np.ndarray, frame_index: int) -> None:
        """Files are numbered through the segment, whatever `frame_index` says."""
        encoded = encode_png(image, _VIDEO_COMPRESSION)
        (self.folder / IMAGE_FILE_PATTERN.format(frame_index=self._num_images)).write_bytes(encoded)
        self._num_images += 1
        self.num_bytes += len(encoded)

    def encode(self, path: Path, fps: int) -> None:
        """Writes the video; `path` may have any suffix."""
        os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder reports every parameter unless told to report errors
        video = self.folder / "segment.mp4"
        encode_video_frames(self.folder, video, fps, overwrite=True)
        shutil.move(video, path)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._num_images = 0
        self.num_bytes = 0


def encode_png(image: np.ndarray, compression: int) -> bytes:
    """(H, W, 3) uint8 -> PNG."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=compression)
    return buffer.getvalue()
