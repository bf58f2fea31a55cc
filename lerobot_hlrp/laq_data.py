"""A LeRobotDataset as the frame tuples that a LAQ trains on.

Frames are decoded once, in order, into a file of the LAQ's own image size, and read from there at the speed of memory:
random access to a LeRobotDataset decodes two images for every sample.

Shape legend: N frames, R the LAQ's image side, A action width.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.pairs import FrameTuples, tuple_starts
from hlrp_core.run_folder import read_json, write_json
from lerobot_hlrp.expectation import expect
from lerobot_hlrp.frame_reader import EpisodeFrames, read_actions, resize_frames

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset


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


def build_frame_tuples(
    dataset: LeRobotDataset, frames: np.ndarray, config: LAQConfig, *, eval_share: float
) -> tuple[FrameTuples, FrameTuples]:
    """Training and held-out tuples, split by whole episodes. Actions, where there are any, only serve the probe."""
    lengths = dataset.meta.episodes["length"][:]
    starts = tuple_starts(lengths, frame_gap=config.frame_gap, num_frames=config.num_frames)
    num_train = split_episodes(len(lengths), eval_share)
    actions = read_actions(dataset)
    train_starts, test_starts = np.concatenate(starts[:num_train]), np.concatenate(starts[num_train:])
    for what, found in (("training", train_starts), ("held-out", test_starts)):
        expect(
            len(found) > 0,
            "frame_gap",
            f"{what} episodes that are longer than the gap",
            config.frame_gap,
            "Use a smaller gap.",
        )
    motions: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if actions is not None:
        sums = _sum_over_gap(actions, config.frame_gap * (config.num_frames - 1))
        mean, std = sums[train_starts].mean(0), np.maximum(sums[train_starts].std(0), 1e-6)
        motions = ((sums[train_starts] - mean) / std, (sums[test_starts] - mean) / std)
    return (
        FrameTuples(frames, train_starts, config.frame_gap, config.num_frames, motions[0]),
        FrameTuples(frames, test_starts, config.frame_gap, config.num_frames, motions[1]),
    )


def _sum_over_gap(actions: np.ndarray, span: int) -> np.ndarray:
    """`[N, A]`: the sum of the `span` actions from each frame on (cut at the end of the data)."""
    total = np.concatenate([np.zeros((1, actions.shape[1])), np.cumsum(actions, axis=0, dtype=np.float64)])
    last = np.minimum(np.arange(len(actions)) + span, len(actions))
    return (total[last] - total[: len(actions)]).astype(np.float32)
