"""A LeRobotDataset as the frame tuples that a LAQ trains on.

Frames are decoded once, in order, into a file of the LAQ's own image size, and read from there at the speed of memory:
random access to a LeRobotDataset decodes two images for every sample.

Shape legend: N frames, R the LAQ's image side, A action width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from hlrp_core.expectation import expect
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.pairs import FrameTuples, tuple_starts
from hlrp_core.run_folder import read_json, write_json
from lerobot_hlrp.frame_reader import EpisodeFrames, read_actions, resize_frames

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset

logger = logging.getLogger(__name__)


def cache_frames(
    dataset: LeRobotDataset, camera: str, size: int, path: Path, *, fingerprint: str, save_interval_s: float = 10.0
) -> np.ndarray:
    """All frames `[N, size, size, 3]` uint8, mapped from `path`, filled first; a killed run's is continued.

    Args:
        fingerprint: of the dataset; a file of another one is made anew.
        save_interval_s: between two notes of how far it is: what a kill can cost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = dataset.meta
    progress_path = path.with_suffix(".json")
    wanted = {"fingerprint": fingerprint, "camera": camera, "size": size}
    progress = read_json(progress_path) if progress_path.is_file() and path.is_file() else {}
    fits = {name: progress.get(name) for name in wanted} == wanted
    done = progress["frames"] if fits else 0
    shape = (meta.total_frames, size, size, 3)
    cache = np.lib.format.open_memmap(path, mode="r+" if fits else "w+", dtype=np.uint8, shape=None if fits else shape)
    source = EpisodeFrames(dataset, camera)
    pieces = [piece for piece in source.pieces() if source.first_rows[piece.episode] + piece.start >= done]
    saved_at = time.monotonic()
    with tqdm(total=meta.total_frames, initial=done, unit="frame", desc="Decoding frames") as bar:
        for frames in source.read_ahead(pieces):
            cache[done : done + len(frames)] = resize_frames(frames, size)
            done += len(frames)
            bar.update(len(frames))
            if done == meta.total_frames or time.monotonic() - saved_at >= save_interval_s:
                cache.flush()
                write_json(progress_path, {**wanted, "frames": done})
                saved_at = time.monotonic()
    return np.load(path, mmap_mode="r")


def split_episodes(num_episodes: int, held_out_share: float) -> int:
    """How many episodes train; the last ones are held out, at least one.

    Raises:
        ValueError: the share leaves none on one side.
    """
    num_held_out = max(1, round(num_episodes * held_out_share))
    expect(
        0 < held_out_share < 1 and num_held_out < num_episodes,
        "eval_share",
        f"a share in (0, 1) that leaves some of {num_episodes} episodes to train on",
        held_out_share,
        "Use 0.1, or a dataset with at least two episodes.",
    )
    return num_episodes - num_held_out


class TuplePlan:
    """Which tuples train and which are held out, by whole episodes: all that can be said without a frame.

    Actions, where there are any, only serve the probe; where some are NaN, their tuples are left out of it.

    Args:
        dataset: all of it.
        config: of the LAQ.
        eval_share: of the episodes, the last ones.
        probe: what it predicts, one of `MOTIONS`.

    Raises:
        ValueError: one side has no episode, or none that is longer than the gap.
    """

    def __init__(self, dataset: LeRobotDataset, config: LAQConfig, *, eval_share: float, probe: str = "sum"):
        self.config = config
        lengths = dataset.meta.episodes["length"][:]
        starts = tuple_starts(lengths, frame_gap=config.frame_gap, num_frames=config.num_frames)
        num_train = split_episodes(len(lengths), eval_share)
        self.train_starts, self.test_starts = np.concatenate(starts[:num_train]), np.concatenate(starts[num_train:])
        for what, found in (("training", self.train_starts), ("held-out", self.test_starts)):
            expect(
                len(found) > 0,
                "frame_gap",
                f"{what} episodes that are longer than the gap",
                config.frame_gap,
                "Use a smaller gap.",
            )
        self.motions = self._measure_motions(read_actions(dataset), MOTIONS[probe])

    def build(self, frames: np.ndarray) -> tuple[FrameTuples, FrameTuples]:
        """Training and held-out tuples of all frames `[N, R, R, 3]`."""
        gap, length = self.config.frame_gap, self.config.num_frames
        return (
            FrameTuples(frames, self.train_starts, gap, length, self.motions[0]),
            FrameTuples(frames, self.test_starts, gap, length, self.motions[1]),
        )

    def _measure_motions(
        self, actions: np.ndarray | None, measure: Callable[[np.ndarray, int], np.ndarray]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if actions is None:
            return None, None
        motions = measure(actions, self.config.frame_gap * (self.config.num_frames - 1))
        train, test = motions[self.train_starts], motions[self.test_starts]
        num_unknown = int(np.isnan(np.concatenate([train, test])).any(1).sum())
        if num_unknown:
            num_all = len(train) + len(test)
            logger.warning("The action probe leaves out %d of %d pairs, whose actions are NaN.", num_unknown, num_all)
        known = train[~np.isnan(train).any(1)]
        if len(known) == 0:
            return None, None
        mean, std = known.mean(0), np.maximum(known.std(0), 1e-6)
        return (train - mean) / std, (test - mean) / std


def sum_over_gap(actions: np.ndarray, span: int) -> np.ndarray:
    """`[N, A]`: the sum of the `span` actions from each frame on (cut at the data's end), NaN if one is unknown."""
    is_known = np.isfinite(actions).all(axis=1, keepdims=True)  # (N, 1)
    last = np.minimum(np.arange(len(actions)) + span, len(actions))

    def sum_of(values: np.ndarray) -> np.ndarray:
        total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])
        return total[last] - total[: len(values)]

    # one NaN in a running sum would be in all that follow
    sums = sum_of(np.where(is_known, actions, 0))
    return np.where(sum_of(~is_known) > 0, np.nan, sums).astype(np.float32)


def difference_over_gap(actions: np.ndarray, span: int) -> np.ndarray:
    """`[N, A]`: the action `span` frames after each frame minus the frame's own; NaN past the data's end, or if one is
    unknown."""
    is_known = np.isfinite(actions).all(axis=1, keepdims=True)  # (N, 1)
    known = np.where(is_known, actions, np.nan)
    differences = np.full(actions.shape, np.nan, dtype=np.float32)
    differences[:-span] = known[span:] - known[:-span]
    return differences


# What the action probe predicts, from the actions of each frame and the frames from the first of a tuple to its last.
MOTIONS = {"sum": sum_over_gap, "difference": difference_over_gap}
