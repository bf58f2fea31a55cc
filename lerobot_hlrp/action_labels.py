"""Which episodes may supervise actions, and the statistics of these alone.

LeRobot's `dataset.meta.stats` are of all episodes. Normalising with them would hand a policy that learns from few
labels the scale of labels it must not see, so they are replaced before the processors are built.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.compute_stats import aggregate_feature_stats
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from hlrp_core.expectation import expect
from lerobot_hlrp.episode_statistics import read_episode_statistics

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


class SupervisionWatch:
    """Notices a training that sees none of the chosen episodes, as with `--dataset.episodes` or `eval_split`.

    Args:
        episodes: that may supervise actions.
        lengths: of all episodes of the dataset, in frames.
    """

    def __init__(self, episodes: Sequence[int], lengths: Sequence[int]):
        self.episodes = list(episodes)
        share = sum(lengths[episode] for episode in episodes) / sum(lengths)
        self._patience = math.ceil(20 / share)  # so many samples miss all of them by chance once in e^20 trainings
        self._num_samples = 0
        self._is_over = False

    def see(self, may_supervise: Tensor) -> None:
        """Args:
            may_supervise: `[B]` bool, of a batch in training.

        Raises:
            ValueError: none of so many samples was of the chosen episodes that they cannot be among the data.
        """
        if self._is_over:
            return
        self._is_over = bool(may_supervise.any())
        self._num_samples += len(may_supervise)
        expect(
            self._is_over or self._num_samples < self._patience,
            "action_episodes",
            f"samples of the episodes that may supervise actions ({self.episodes})",
            f"none among the first {self._num_samples}",
            "Choose episodes that the training sees: those of --dataset.episodes, and not the last ones, which "
            "--dataset.eval_split holds out.",
        )


def restrict_statistics(meta: LeRobotDatasetMetadata, episodes: Sequence[int]) -> None:
    """Replace the statistics of action and state in `meta.stats` by those of `episodes`.

    It changes `meta.stats` itself: from there LeRobot builds the processors of a fresh policy and overrides those of
    a loaded one.
    """
    keys = [key for key in (ACTION, OBS_STATE) if key in meta.features]
    per_episode = read_episode_statistics(meta, keys=keys, episodes=episodes)
    complete = [of_episode for of_episode in per_episode.values() if set(of_episode) == set(keys)]
    expect(
        len(complete) == len(episodes),
        f"dataset {meta.repo_id}",
        f"statistics of {', '.join(keys)} for each of {len(episodes)} episodes",
        f"those of {len(complete)}",
        "Recompute the dataset's statistics with LeRobot.",
    )
    for key in keys:
        arrays = [{name: np.atleast_1d(np.asarray(value)) for name, value in s[key].items()} for s in complete]
        meta.stats[key] = _widen(aggregate_feature_stats(arrays))


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


def check_statistics(
    stats: Mapping[str, Mapping[str, Any]] | None,
    features: Mapping[str, PolicyFeature],
    normalization: Mapping[str, NormalizationMode],
) -> None:
    """LeRobot's normaliser skips a feature without statistics silently, and broadcasts a single number; here both are
    errors.

    Raises:
        ValueError: the statistics of an action or state that is to be normalised are missing, not finite, or of another
            width than the policy's.
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
        widths = {np.atleast_1d(have[name]).shape[-1] for name in _NEEDED[mode]}
        expect(
            widths == set(feature.shape),
            f"width of {key}",
            f"{feature.shape[0]}, as the policy has it",
            f"{', '.join(map(str, sorted(widths)))} in the dataset's statistics",
            "Use data of the robot that the policy learned from.",
        )


def _is_finite(values: Any) -> bool:
    return values is not None and bool(np.isfinite(np.asarray(values, dtype=np.float64)).all())
