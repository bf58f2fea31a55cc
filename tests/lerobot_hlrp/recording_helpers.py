"""What the tests of recording share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.io_utils import load_stats

from lerobot_hlrp.envs import TabletopEnvConfig
from lerobot_hlrp.recording.layout import DatasetLayout
from lerobot_hlrp.recording.session import RecordingPlan
from lerobot_hlrp.recording.sources import Source, make_source

IMAGE_SIZE = 32


def make_plan(root: Path, episodes: int = 8, **settings) -> tuple[RecordingPlan, Source]:
    env_settings = {name: settings.pop(name) for name in ("task", "episode_length") if name in settings}
    source = make_source(TabletopEnvConfig(image_size=IMAGE_SIZE, **env_settings))
    layout = DatasetLayout(
        robot_type=source.name,
        fps=source.fps,
        image_shape=source.image_shape,
        state_names=source.state_names if settings.pop("with_state", True) else (),
        action_names=source.action_names if settings.pop("with_actions", True) else (),
        use_video=settings.pop("use_video", False),
    )
    return RecordingPlan(root=root, layout=layout, num_episodes=episodes, **settings), source


def load(root: Path) -> LeRobotDataset:
    return LeRobotDataset("local/test", root=root)


def assert_same_dataset(one: Path, other: Path) -> None:
    """Every item, the episodes table (but for the file numbers), the statistics and the manifest."""
    first, second = load(one), load(other)
    assert len(first) == len(second)
    for index in range(len(first)):
        assert_same_item(first[index], second[index])
    tables = [
        pd.concat(map(pd.read_parquet, sorted((root / "meta/episodes").rglob("*.parquet")))) for root in (one, other)
    ]
    for table in tables:
        table.drop(columns=[name for name in table if name.endswith("_index") and "/" in name], inplace=True)
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))
    assert_same_statistics(one, other)
    pd.testing.assert_frame_equal(first.meta.tasks, second.meta.tasks)


def assert_same_item(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=0)
        else:
            assert value == other[key]


def assert_same_statistics(one: Path, other: Path) -> None:
    first, second = load_stats(one), load_stats(other)
    assert first is not None
    assert second is not None
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert values.keys() == second[key].keys()
        for name, value in values.items():
            np.testing.assert_allclose(value, second[key][name], rtol=1e-6, err_msg=f"{key} {name}")
