"""What makes a dataset this dataset: a hash that survives a move and a rename, and differs for other contents."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from lerobot_hlrp.episode_statistics import read_episode_statistics

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata


def dataset_fingerprint(meta: LeRobotDatasetMetadata) -> str:
    """SHA-256 over frame rate, features, and every episode's length, tasks and means of its columns.

    It needs the metadata alone. Two recordings of equal length differ in the means.
    """
    digest = hashlib.sha256()
    features = {name: [ft["dtype"], list(ft["shape"])] for name, ft in sorted(meta.features.items())}
    digest.update(json.dumps([meta.fps, meta.total_frames, features]).encode())
    for name in ("length", "tasks"):
        digest.update(json.dumps(meta.episodes[name][:]).encode())
    for statistics in read_episode_statistics(meta, statistics=["mean"]).values():
        means = {key: of_feature.get("mean") for key, of_feature in sorted(statistics.items())}
        digest.update(json.dumps(means).encode())
    return digest.hexdigest()
