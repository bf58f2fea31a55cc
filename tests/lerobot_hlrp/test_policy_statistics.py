"""Which episodes supervise actions, and where the statistics come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets import LeRobotDatasetMetadata

from lerobot_hlrp.action_labels import check_statistics, choose_action_episodes, restrict_statistics
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.processors import make_pre_post_processors

FEATURES = {
    "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
    "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
    "action": PolicyFeature(FeatureType.ACTION, (2,)),
}
MEAN_STD = {"STATE": NormalizationMode.MEAN_STD, "ACTION": NormalizationMode.MEAN_STD}


def read_column(root: Path, name: str, episodes: list[int]) -> np.ndarray:
    import pyarrow.dataset as pa_dataset

    table = pa_dataset.dataset(root / "data", format="parquet").to_table(columns=[name, "episode_index"])
    rows = zip(table[name].to_pylist(), table["episode_index"].to_pylist(), strict=True)
    return np.array([value for value, episode in rows if episode in episodes])


@pytest.fixture
def meta(tiny_dataset: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("test/tiny", root=tiny_dataset)


def test_statistics_are_those_of_the_chosen_episodes(meta, tiny_dataset):
    images = meta.stats["observation.images.top"]
    restrict_statistics(meta, [0, 2])
    for key in ("action", "observation.state"):
        values = read_column(tiny_dataset, key, [0, 2])
        for name, expected in (("mean", values.mean(0)), ("std", values.std(0)), ("min", values.min(0))):
            np.testing.assert_allclose(meta.stats[key][name], expected, rtol=1e-4)
        assert meta.stats[key]["count"] == len(values)
    assert meta.stats["observation.images.top"] is images


def test_all_episodes_give_the_statistics_that_lerobot_has(meta):
    before = {key: dict(meta.stats[key]) for key in ("action", "observation.state")}
    restrict_statistics(meta, range(meta.total_episodes))
    for key, statistics in before.items():
        for name, value in statistics.items():
            np.testing.assert_allclose(meta.stats[key][name], value, rtol=1e-4, err_msg=f"{key} {name}")


def test_a_dimension_that_stands_still_is_not_divided_by_zero(tmp_path):
    from lerobot.datasets import LeRobotDataset

    features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
    dataset = LeRobotDataset.create("test/still", fps=10, features=features, root=tmp_path / "still", use_videos=False)
    for episode in range(2):
        for step in range(4):
            dataset.add_frame({"action": np.array([step, 5.0 + episode], dtype=np.float32), "task": "x"})
        dataset.save_episode()
    dataset.finalize()
    meta = LeRobotDatasetMetadata("test/still", root=tmp_path / "still")
    restrict_statistics(meta, [0])
    stats = meta.stats["action"]
    np.testing.assert_allclose(stats["std"], [np.std([0, 1, 2, 3]), 1.0])
    np.testing.assert_allclose([stats["min"], stats["max"]], [[0.0, 4.5], [3.0, 5.5]])


def test_a_larger_share_contains_a_smaller_one():
    def choose(share: float, seed: int = 0) -> list[int]:
        return choose_action_episodes(HLRPQwenConfig(action_episode_share=share, action_episode_seed=seed), 40)

    assert choose(0.1) == choose(0.1)
    assert len(choose(0.1)) == 4
    assert set(choose(0.1)) < set(choose(0.5)) < set(choose(1.0))
    assert choose(0.1) != choose(0.1, seed=1)
    assert len(choose(0.001)) == 1


def test_episodes_must_be_the_datasets():
    assert choose_action_episodes(HLRPQwenConfig(), 4) is None
    assert choose_action_episodes(HLRPQwenConfig(action_episodes=[3, 1, 3]), 4) == [1, 3]
    for episodes in ([], [4], [-1]):
        with pytest.raises(ValueError, match=r"\[0, 4\).*--policy\.action_episodes"):
            choose_action_episodes(HLRPQwenConfig(action_episodes=episodes), 4)


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        (None, "observation.state.*mean, std"),
        ({"observation.state": {"mean": np.zeros(3), "std": np.ones(3)}}, "statistics of action"),
        (
            {
                "observation.state": {"mean": np.zeros(3), "std": np.ones(3)},
                "action": {"mean": np.array([0.0, np.nan]), "std": np.ones(2)},
            },
            "action.*for mean.*--policy.action_episodes",
        ),
        (
            {
                "observation.state": {"mean": np.zeros(1), "std": np.ones(1)},
                "action": {"mean": np.zeros(2), "std": np.ones(2)},
            },
            "width of observation.state: expected 3.*got 1 .*Next step",
        ),
    ],
)
def test_missing_statistics_are_an_error(stats, words):
    with pytest.raises(ValueError, match=words):
        check_statistics(stats, FEATURES, MEAN_STD)


def test_statistics_that_no_one_needs_may_be_missing():
    check_statistics(None, FEATURES, {"ACTION": NormalizationMode.IDENTITY})
    config = HLRPQwenConfig(input_features=FEATURES, output_features={})
    make_pre_post_processors(config, None)  # mode=codes normalises nothing it uses
    config.mode = "actions"
    with pytest.raises(ValueError, match="statistics"):
        make_pre_post_processors(config, None)
