"""Which episodes may supervise actions, and the statistics of these alone.

LeRobot's `dataset.meta.stats` are of all episodes. Normalising with them would hand a policy that learns from few
labels the scale of labels it must not see, so they are replaced before the processors are built.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.utils.constants import ACTION, OBS_STATE

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

    from lerobot_hlrp.policy_config import HLRPConfig

logger = logging.getLogger(__name__)

_STILL = 1e-6
_NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}


def choose_action_episodes(config: HLRPConfig, num_episodes: int) -> list[int] | None:
    """Episodes that may supervise actions, sorted; None where the config does not limit them.

    Raises:
        ValueError: an episode that the dataset does not have.
    """
    if config.action_episode_share is not None:
        order = list(range(num_episodes))
        random.Random(config.action_episode_seed).shuffle(order)
        return sorted(order[: max(1, round(config.action_episode_share * num_episodes))])
    if config.action_episodes is None:
        return None
    chosen = sorted(set(config.action_episodes))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_episodes:
        raise ValueError(
            f"action_episodes: expected episodes in [0, {num_episodes}), got {config.action_episodes}. Next step: list "
            "episodes of this dataset, or leave --policy.action_episodes out."
        )
    return chosen


def restrict_statistics(meta: LeRobotDatasetMetadata, episodes: Sequence[int]) -> None:
    """Replace the statistics of action and state in `meta.stats` by those of `episodes`.

    It changes `meta.stats` itself: from there LeRobot builds the processors of a fresh policy and overrides those of
    a loaded one.
    """
    keys = [key for key in (ACTION, OBS_STATE) if key in meta.features]
    per_episode = _read_episode_statistics(meta, episodes, keys)
    for key, statistics in aggregate_stats(per_episode).items():
        meta.stats[key] = _widen(statistics)


def _widen(statistics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give a dimension that never moves a width of 1.

    In few episodes a gripper may stand still. Divided by a width of 0, its first movement would be a number of eight
    digits.
    """
    wide = dict(statistics)
    wide["std"] = np.where(wide["std"] < _STILL, 1.0, wide["std"])
    for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        if low in wide and high in wide:
            still = wide[high] - wide[low] < _STILL
            wide |= {low: wide[low] - 0.5 * still, high: wide[high] + 0.5 * still}
    return wide


def _read_episode_statistics(
    meta: LeRobotDatasetMetadata, episodes: Sequence[int], keys: Sequence[str]
) -> list[dict[str, dict[str, np.ndarray]]]:
    import pyarrow.dataset as pa_dataset

    files = pa_dataset.dataset(meta.root / "meta" / "episodes", format="parquet")
    columns = {name: name.split("/") for name in files.schema.names if name.startswith("stats/")}
    columns = {name: parts for name, parts in columns.items() if parts[1] in keys}
    missing = sorted(set(keys) - {parts[1] for parts in columns.values()})
    chosen = pa_dataset.field("episode_index").isin(list(episodes))
    rows = files.to_table(columns=["episode_index", *columns], filter=chosen).to_pylist()
    if missing or len(rows) != len(episodes):
        raise ValueError(
            f"dataset {meta.repo_id}: expected statistics of every episode for {', '.join(keys)}, got "
            f"{len(rows)} of {len(episodes)} episodes and none for {missing or 'no key'}. Next step: recompute the "
            "dataset's statistics with LeRobot."
        )
    statistics: list[dict[str, dict[str, np.ndarray]]] = []
    for row in rows:
        of_episode: dict[str, dict[str, np.ndarray]] = {}
        for name, (_, key, statistic) in columns.items():
            of_episode.setdefault(key, {})[statistic] = np.atleast_1d(np.asarray(row[name]))
        statistics.append(of_episode)
    return statistics


def check_statistics(
    stats: Mapping[str, Mapping[str, Any]] | None,
    features: Mapping[str, PolicyFeature],
    normalization: Mapping[str, NormalizationMode],
) -> None:
    """LeRobot's normaliser skips a feature without statistics silently; here that is an error.

    Raises:
        ValueError: the statistics of an action or state that is to be normalised are missing or not finite.
    """
    for key, feature in features.items():
        mode = normalization.get(feature.type.value, NormalizationMode.IDENTITY)
        if feature.type not in (FeatureType.ACTION, FeatureType.STATE) or mode not in _NEEDED:
            continue
        have = (stats or {}).get(key, {})
        broken = [name for name in _NEEDED[mode] if not _is_finite(have.get(name))]
        if broken:
            raise ValueError(
                f"statistics of {key}: expected finite {' and '.join(_NEEDED[mode])} for {mode.value}, got none for "
                f"{', '.join(broken)}. Next step: recompute the dataset's statistics; if some episodes have no actions "
                "(NaN), list the others in --policy.action_episodes."
            )


def _is_finite(values: Any) -> bool:
    return values is not None and bool(np.isfinite(np.asarray(values, dtype=np.float64)).all())
