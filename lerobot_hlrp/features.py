"""Which features of a dataset or environment a policy uses: one camera or more, the state, the actions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import OBS_STATE

from hlrp_core.expectation import expect
from hlrp_core.heads import ACTION_HEADS

if TYPE_CHECKING:
    from lerobot_hlrp.policy_config import HLRPConfig

logger = logging.getLogger(__name__)


def settle_features(config: HLRPConfig) -> None:
    """Turn camera names into feature keys, drop the cameras that are not used, and check what the mode needs.

    Raises:
        ValueError: no image, an unknown or ambiguous camera, or no actions to learn.
    """
    cameras = list(config.image_features)
    expect(
        bool(cameras),
        "features",
        "at least one camera (observation.images.*)",
        f"none among {sorted(config.input_features or {})}",
        "Use a dataset or environment with images.",
    )
    config.camera = find_camera(config.camera, cameras)
    extra = "--policy.extra_cameras=[{}]"
    config.extra_cameras = [find_camera(name, cameras, flag=extra) for name in config.extra_cameras]
    used = config.cameras
    expect(
        len(set(used)) == len(used), "cameras", "each once", ", ".join(used), "Leave it out of --policy.extra_cameras."
    )
    for name in used:
        channels = config.image_features[name].shape[0]
        expect(channels == 3, f"camera {name}", "3 colour channels", channels, "Choose an RGB camera.")
    # a camera that is not used need not be there when the policy runs
    unused = [name for name in cameras if name not in used]
    if unused:
        names = ",".join(name.rsplit(".", 1)[-1] for name in unused)
        logger.info("Cameras that the policy does not see: %s (--policy.extra_cameras=[%s])", ", ".join(unused), names)
    features = config.input_features or {}
    config.input_features = {key: ft for key, ft in features.items() if key not in cameras or key in used}
    if config.learns_actions:
        _check_action_features(config)
    expect(
        not config.prompt.state_text or config.robot_state_feature is not None,
        "data for prompt.state_text",
        f"a state ({OBS_STATE})",
        f"none; they have {', '.join(sorted(features))}",
        "Use data with a state, or --policy.prompt.state_text=false.",
    )
    for key, feature in config.normalized_features().items():
        expect(len(feature.shape) == 1, key, "a vector", f"shape {list(feature.shape)}", "Flatten it in the dataset.")


def _check_action_features(config: HLRPConfig) -> None:
    expect(
        config.action_head is not None,
        f"action_head with mode={config.mode}",
        f"one of {', '.join(ACTION_HEADS)}",
        None,
        "Set --policy.action_head.",
    )
    expect(
        config.action_feature is not None,
        f"dataset for mode={config.mode}",
        "an 'action' column",
        f"none; it has {', '.join(sorted(config.input_features or {}))}",
        "Use a dataset with actions, or --policy.mode=codes.",
    )


def find_camera(name: str | None, cameras: Sequence[str], *, flag: str = "--policy.camera={}") -> str:
    """The feature key of a camera that is given by its key, by its last part, or not at all.

    Args:
        flag: how the user says it, with `{}` for the name.

    Raises:
        ValueError: no such camera, or none given where there are several; all are listed.
    """
    if name is None:
        expect(
            len(cameras) == 1,
            "camera",
            f"the name of one, as there are several: {', '.join(cameras)}",
            None,
            f"Set {flag.split('=')[0]}, for example to {cameras[0]}.",
        )
        return cameras[0]
    found = _matching(name, cameras)
    if len(found) != 1:
        names = {short: key for key in cameras for short in _names(key)}
        close = found or get_close_matches(name, names, n=1, cutoff=0.0)
        renaming = " Or rename the dataset's with --rename_map." if flag.startswith("--policy.") else ""
        next_step = f"Did you mean {flag.format(close[0])}?{renaming}"
        expect(False, "camera", f"one of {', '.join(cameras)}", name, next_step)
    return found[0]


def _matching(name: str, cameras: Sequence[str]) -> list[str]:
    return [key for key in cameras if name in _names(key)]


def _names(key: str) -> tuple[str, ...]:
    """What a user may call a camera."""
    return key, key.removeprefix("observation."), key.removeprefix("observation.images."), key.rsplit(".", 1)[-1]


def adopt_features(config: HLRPConfig, features: Mapping[str, PolicyFeature], *, with_state: bool) -> None:
    """Let a loaded policy see what the data of its new run have and those of its last had not.

    Args:
        features: of the new dataset.
        with_state: take the state from there too, because the action head is new.
    """
    inputs = dict(config.input_features or {})
    cameras = [key for key, feature in features.items() if feature.type is FeatureType.VISUAL]
    for name in config.cameras:
        inputs |= {key: features[key] for key in _matching(name, cameras)}
    if with_state:
        inputs.pop(OBS_STATE, None)
        state = features.get(OBS_STATE)
        inputs |= {OBS_STATE: state} if state is not None else {}
    config.input_features = inputs
