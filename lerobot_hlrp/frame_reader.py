"""Frames of one camera in order, a piece of an episode at a time: what stage 1 reads.

`EpisodeFrames` is the fast way; `read_frame` goes through LeRobot's own items and is the slow twin that the tests
hold it equal to.

Shape legend: n frames of an episode, H W image size, A action width.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from lerobot.utils.constants import ACTION
from PIL import Image

from hlrp_core.expectation import expect
from hlrp_core.laq.quantizer import resize_images
from lerobot_hlrp.batch import to_frames
from lerobot_hlrp.features import find_camera

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata


def choose_camera(meta: LeRobotDatasetMetadata, camera: str | None) -> str:
    """The named camera's key, or the only one's, by the rule of the policies (`features.find_camera`).

    Raises:
        ValueError: no camera, several without a choice, or none of that name; the cameras there are named.
    """
    cameras = list(meta.camera_keys)
    expect(bool(cameras), "camera", "a dataset with images or video", f"one without ({meta.repo_id})", "Use another.")
    return find_camera(camera, cameras, flag="--camera={}")


class Piece(NamedTuple):
    """Frames `[start, stop)` of an episode, counted from its first."""

    episode: int
    start: int
    stop: int


class EpisodeFrames:
    """The frames of one camera, by episode.

    Args:
        dataset: LeRobot's, of all its episodes.
        camera: key of the camera.
    """

    def __init__(self, dataset: LeRobotDataset, camera: str):
        self.dataset = dataset
        self.camera = camera
        self.is_video = camera in dataset.meta.video_keys
        episodes = dataset.meta.episodes  # every look at a column converts all of it: once is enough
        self.first_rows: list[int] = episodes["dataset_from_index"][:]
        self.lengths: list[int] = episodes["length"][:]
        if self.is_video:
            self._video_backend = dataset._video_backend  # as the user named it, or LeRobot's default
            self._start_times: list[float] = episodes[f"videos/{camera}/from_timestamp"][:]
        else:
            self._images = dataset.hf_dataset.data.column(camera)

    def __len__(self) -> int:
        return len(self.lengths)

    def pieces(self, *, overlap: int = 0, num_frames: int = 256) -> list[Piece]:
        """All frames in order, in pieces that fit into memory, however long episodes are.

        Args:
            overlap: frames that neighbours in an episode share, beyond `num_frames`; an episode that is no longer than
                that has no piece.
        """
        return [
            Piece(episode, start, min(start + num_frames, length - overlap) + overlap)
            for episode, length in enumerate(self.lengths)
            for start in range(0, length - overlap, num_frames)
        ]

    def read(self, piece: Piece) -> np.ndarray:
        """Its frames `[n, H, W, 3]` uint8, in order."""
        if self.is_video:
            return self._read_video(piece)
        first, length = self.first_rows[piece.episode] + piece.start, piece.stop - piece.start
        return np.stack([_decode_image(cell) for cell in self._images.slice(first, length).to_pylist()])

    def read_ahead(self, pieces: Iterable[Piece], *, num_frames: int = 256) -> Iterator[np.ndarray]:
        """What `read` gives for each of these pieces, in order, decoded in a thread while the caller works.

        Args:
            num_frames: decoded beyond the piece in use, but at least the next one: this bounds memory.
        """
        remaining = iter(pieces)
        waiting: deque[tuple[int, Future[np.ndarray]]] = deque()

        def fill(thread: Executor) -> None:
            num_waiting = sum(length for length, _ in waiting)
            while num_waiting < num_frames and (piece := next(remaining, None)) is not None:
                length = piece.stop - piece.start
                waiting.append((length, thread.submit(self.read, piece)))
                num_waiting += length

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decoding") as thread:
            try:
                fill(thread)
                while waiting:
                    _, frames = waiting.popleft()
                    fill(thread)
                    yield frames.result()
            finally:
                for _, frames in waiting:
                    frames.cancel()

    def _read_video(self, piece: Piece) -> np.ndarray:
        from lerobot.datasets.video_utils import decode_video_frames

        from lerobot_hlrp.video_decoding import decode_in_order

        meta, tolerance_s = self.dataset.meta, self.dataset.tolerance_s
        start = self._start_times[piece.episode]
        timestamps = [start + i / meta.fps for i in range(piece.start, piece.stop)]
        path = self.dataset.root / meta.get_video_file_path(piece.episode, self.camera)
        if self._video_backend == "pyav":
            return decode_in_order(path, timestamps, fps=meta.fps, tolerance_s=tolerance_s)
        images = decode_video_frames(
            path, timestamps, tolerance_s, backend=self._video_backend, return_uint8=True
        )  # (n, 3, H, W)
        return images.permute(0, 2, 3, 1).contiguous().numpy()


def _decode_image(cell: dict) -> np.ndarray:
    source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
    return np.asarray(Image.open(source).convert("RGB"))


def read_frame(dataset: LeRobotDataset, camera: str, index: int) -> np.ndarray:
    """One frame `[H, W, 3]` uint8 through LeRobot's own item: the slow reference."""
    return to_frames(dataset[index][camera][None])[0, 0].numpy()


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Frames `[n, H, W, 3]` uint8 -> `[n, size, size, 3]` uint8."""
    if frames.shape[1:3] == (size, size):
        return frames
    resized = resize_images(torch.from_numpy(frames).permute(0, 3, 1, 2), size)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def read_actions(dataset: LeRobotDataset) -> np.ndarray | None:
    """All actions `[N, A]` float32, in order, NaN where some are not known; None where the dataset has none."""
    if ACTION not in dataset.meta.features:
        return None
    column = dataset.hf_dataset.data.column(ACTION)
    actions = np.stack(column.to_numpy()).astype(np.float32)
    return actions.reshape(len(column), -1)  # LeRobot stores vectors of one number as numbers
