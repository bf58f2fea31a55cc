"""Policies by the core's names: for commands that know a backend, or a core bundle, and no policy type."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lerobot_policy_hlrp  # noqa: F401 - registers the policy types
from hlrp_core.bundle import MANIFEST, config_from_dict, load_backend, read_manifest
from hlrp_core.expectation import expect
from hlrp_core.registry import get_recipe
from lerobot_hlrp.checkpoint import fetch_folder
from lerobot_hlrp.dataset_folder import load_metadata
from lerobot_hlrp.frame_gap import frames_apart

if TYPE_CHECKING:
    from lerobot.configs.default import DatasetConfig
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.processor import PolicyProcessorPipeline

    from hlrp_core.backends.config import BackendConfig
    from lerobot_hlrp.policy import HLRPPolicy
    from lerobot_hlrp.policy_config import HLRPConfig


def find_policy_type(backend: str) -> tuple[str, str, str]:
    """Policy type, prompting and code head that make up a backend of the core.

    Raises:
        ValueError: no such backend, or none of a policy type.
    """
    from lerobot.configs.policies import PreTrainedConfig

    get_recipe(backend)
    for name, choice in PreTrainedConfig.get_known_choices().items():
        for (prompting, code_head), composed in getattr(choice, "backends", {}).items():
            if composed == backend:
                return name, prompting, code_head
    raise ValueError(
        f"backend: expected one of a LeRobot policy type, got {backend!r}. Next step: add it to the `backends` of a "
        "policy's config."
    )


def make_code_policy(
    dataset: DatasetConfig, backend: str, *, device: str, **settings: Any
) -> tuple[HLRPPolicy, LeRobotDatasetMetadata]:
    """A fresh policy on a pretrained backbone, and the metadata of the data it learns from.

    Args:
        settings: of the policy's config, such as `backbone`, `codes`, and a `mode` other than `codes`.
    """
    from lerobot.policies.factory import make_policy, make_policy_config

    expect(
        settings.get("codes") is not None or settings.get("laq") is not None,
        "labels",
        "--codes=<code table of the dataset> or --laq=<folder or Hub id>",
        "none",
        "Make a code table with hlrp-label.",
    )
    policy_type, prompting, code_head = find_policy_type(backend)
    config = make_policy_config(policy_type, prompting=prompting, code_head=code_head, device=device, **settings)
    meta = load_metadata(dataset)
    return make_policy(config, ds_meta=meta), meta  # type: ignore[return-value]


def load_code_policy(
    path: str | Path, dataset: DatasetConfig, *, device: str | None, own_features: bool = False, **settings: Any
) -> tuple[HLRPPolicy, LeRobotDatasetMetadata]:
    """A saved policy, or a core bundle, in codes mode with the labels that `settings` name.

    Args:
        path: folder, or repository on the Hub.
        own_features: the dataset's width of state and its cameras stand instead of the saved ones.
        settings: of the policy's config; those that are None leave the saved ones.

    Raises:
        BundleError: a part is missing or altered.
        ValueError: the labels do not fit the policy or the dataset.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import make_policy
    from lerobot.utils.constants import OBS_STATE
    from lerobot.utils.feature_utils import dataset_to_policy_features

    folder, meta = fetch_folder(path), load_metadata(dataset)
    settings = {name: value for name, value in settings.items() if value is not None}
    if (folder / "config.json").is_file():
        config: Any = PreTrainedConfig.from_pretrained(folder)
        expect(
            hasattr(config, "backends"), "policy", "one of this package's types", config.type, "Choose another folder."
        )
        config.pretrained_path, config.mode = folder, "codes"
        own = dataset_to_policy_features(meta.features)
        if own_features:
            config.input_features = own
        elif config.reads_state and config.robot_state_feature is not None:
            state = own.get(OBS_STATE)
            expect(
                state is None or state.shape == config.robot_state_feature.shape,
                f"width of {OBS_STATE}",
                f"{config.robot_state_feature.shape[0]}, as the policy has it",
                f"{state and state.shape[0]} in {dataset.repo_id}",
                "For another dataset of the mix that it learned from, set --own_statistics=true.",
            )
        for name, value in settings.items():
            setattr(config, name, value)
        if config.laq is not None:  # labels online, as far apart as in training
            expect(
                config.frame_gap_s is not None,
                "frame_gap_s",
                "Δ of the labels, as the policy learned from several or none",
                None,
                "Set --frame_gap_s, in seconds.",
            )
            config.frame_gap = frames_apart(config.frame_gap_s, meta.fps, dataset.repo_id)
        config.device = device or config.device
        config.__post_init__()
        return make_policy(config, ds_meta=meta), meta  # type: ignore[return-value]
    expect(
        (folder / MANIFEST).is_file(),
        "policy.path",
        f"a policy's folder (config.json) or a core bundle ({MANIFEST})",
        f"neither in {folder}",
        "Name the folder `pretrained_model` of a checkpoint.",
    )
    return _wrap_bundle(folder, meta, device=device, **settings), meta


def _wrap_bundle(folder: Path, meta: LeRobotDatasetMetadata, *, device: str | None, **settings: Any) -> HLRPPolicy:
    from lerobot.policies.factory import get_policy_class
    from lerobot.utils.feature_utils import dataset_to_policy_features

    if (seconds := settings.pop("frame_gap_s", None)) is not None:
        settings["frame_gap"] = frames_apart(seconds, meta.fps, meta.repo_id)
    backend = load_backend(folder)
    manifest = read_manifest(folder)
    config = build_policy_config(config_from_dict(manifest["backend"]), device=device, **settings)
    config.input_features = dataset_to_policy_features(meta.features)
    return get_policy_class(config.type)(config, backend=backend, dataset_meta=meta).eval()  # type: ignore[return-value, call-arg]


def load_preprocessor(
    path: str | Path, policy: HLRPPolicy, meta: LeRobotDatasetMetadata
) -> PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]:
    """The preprocessor of a policy from `load_code_policy`; a core bundle has none, and gets the dataset's statistics.

    Args:
        path: folder, or repository on the Hub.
        meta: of the dataset at hand.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME

    folder = fetch_folder(path)
    if not (folder / f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json").is_file():
        return make_pre_post_processors(policy.config, dataset_stats=meta.stats)[0]  # type: ignore[arg-type]
    overrides = {"device_processor": {"device": policy.config.device}}
    saved = make_pre_post_processors(policy.config, str(folder), preprocessor_overrides=overrides)  # type: ignore[arg-type]
    return saved[0]


def build_policy_config(backend: BackendConfig, *, device: str | None = None, **settings: Any) -> HLRPConfig:
    """The policy config of a backend's settings, in codes mode: the way back from `build_backend_config`."""
    from lerobot.policies.factory import make_policy_config

    policy_type, prompting, code_head = find_policy_type(backend.name)
    config: Any = make_policy_config(policy_type, mode="codes", prompting=prompting, code_head=code_head)
    shared = {f.name for f in fields(config)} & {f.name for f in fields(backend)} - {"name", "action_head"}
    for name in shared:
        setattr(config, name, getattr(backend, name))
    for name, value in settings.items():
        setattr(config, name, value)
    config.device = device or config.device
    config.__post_init__()
    return config
