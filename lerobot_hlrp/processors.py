"""Processors that all policy types share: LeRobot's own scaffold.

The steps carry LeRobot's names (rename, batch, device, normalise; unnormalise, device), because fine-tuning overrides
them by name. Nothing that a flag chooses lives here: a saved policy's processors are loaded from its folder.
"""

from __future__ import annotations

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_hlrp.action_labels import check_statistics
from lerobot_hlrp.policy_config import HLRPConfig


def make_pre_post_processors(
    config: HLRPConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]],
    PolicyProcessorPipeline[PolicyAction, PolicyAction],
]:
    """Pre- and postprocessor of a fresh policy.

    Args:
        dataset_stats: statistics of the dataset, after the policy was built on it (`restrict_statistics`).

    Raises:
        ValueError: statistics that the policy needs are missing.
    """
    check_statistics(dataset_stats, config.normalized_features(), config.normalization_mapping)
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
