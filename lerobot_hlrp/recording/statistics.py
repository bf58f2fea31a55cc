"""Statistics of one episode, by LeRobot's own functions, from images in memory instead of files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from lerobot.datasets.compute_stats import (
    auto_downsample_height_width,
    compute_episode_stats,
    get_feature_stats,
    sample_indices,
)
from lerobot.utils.constants import OBS_IMAGE
from lerobot.utils.utils import unflatten_dict

Statistics = dict[str, dict[str, np.ndarray]]
_PREFIX = "stats/"


def episode_statistics(
    columns: dict[str, np.ndarray], images: list[np.ndarray], features: dict[str, dict[str, Any]]
) -> Statistics:
    """`{key: {"min", "max", "mean", "std", "count", "q01", ...}}`; an image's are per channel, (3, 1, 1), in [0, 1]."""
    return {OBS_IMAGE: _image_statistics(images)} | compute_episode_stats(columns, features)


def read_statistics(episodes: pa.Table) -> list[Statistics]:
    """What the rows of a `meta/episodes` file say, one entry per episode."""
    names = [name for name in episodes.column_names if name.startswith(_PREFIX)]
    rows = episodes.select(names).to_pylist()
    return [
        unflatten_dict({name.removeprefix(_PREFIX): np.array(value) for name, value in row.items()}) for row in rows
    ]


def _image_statistics(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    sampled = [images[index].transpose(2, 0, 1) for index in sample_indices(len(images))]
    stack = np.stack([auto_downsample_height_width(image) for image in sampled])  # (S, 3, H', W')
    statistics = get_feature_stats(stack, axis=(0, 2, 3), keepdims=True)
    return {name: value if name == "count" else np.squeeze(value / 255.0, axis=0) for name, value in statistics.items()}
