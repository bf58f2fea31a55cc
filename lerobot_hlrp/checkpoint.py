"""Backends of a policy: built on a pretrained backbone, or loaded from a saved policy's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot.utils.feature_utils import dataset_to_policy_features

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.bundle import WEIGHTS, build_saved_backend, config_from_dict, load_tensors, read_manifest
from hlrp_core.expectation import expect
from hlrp_core.heads import hand_over_code_vectors
from hlrp_core.registry import make_backend
from lerobot_hlrp.code_vectors import read_code_vectors
from lerobot_hlrp.core_settings import build_backend_config
from lerobot_hlrp.features import adopt_features
from lerobot_hlrp.hub_folder import fetch
from lerobot_hlrp.preview import LAQ_FOLDER

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata
    from torch import Tensor

    from hlrp_core.backends.config import BackendConfig
    from lerobot_hlrp.policy_config import HLRPConfig

_HEAD = "action_head."


def build_new_backend(config: HLRPConfig) -> ComposedBackend:
    """A backend on the pretrained backbone that the config names; writes the code sizes into the config.

    Raises:
        ValueError: no backbone, one of another family, or settings that do not fit each other.
    """
    expect(
        config.backbone is not None,
        "backbone",
        "a Hub id or a folder with a Hugging Face checkpoint",
        None,
        "Set --policy.backbone, or start from a checkpoint with --policy.path.",
    )
    assert config.backbone is not None
    vectors = read_code_vectors(config, has_new_code_head=True)
    settings = dict(vars(build_backend_config(config, code_vector_dim=_width(vectors))))
    config.codebook_size, config.code_seq_len = settings["codebook_size"], settings["code_seq_len"]
    return make_backend(
        settings.pop("name"),
        backbone=config.backbone,
        dtype=config.backbone_dtype,
        code_vectors=vectors,
        **settings,
    )


def _width(vectors: Tensor | None) -> int | None:
    return None if vectors is None else vectors.shape[-1]


def load_saved_backend(
    folder: Path, config: HLRPConfig, dataset_meta: LeRobotDatasetMetadata | None = None
) -> ComposedBackend:
    """The backend of a saved policy, with the action head that the config adds to it.

    Writes into the config what the checkpoint fixes.

    Raises:
        BundleError: a part is missing or altered.
        ValueError: settings do not fit the checkpoint.
    """
    manifest = read_manifest(folder)
    saved = config_from_dict(manifest["backend"])
    _expect_same_code_head(config, saved, folder)
    _expect_same_backbone(config, manifest["extra"].get("backbone"), folder)
    _expect_same_code_vectors(config, saved, manifest["extra"].get("laq") or {}, folder)
    is_new_head = saved.action_head is None
    if dataset_meta is not None:
        adopt_features(config, dataset_to_policy_features(dataset_meta.features), with_state=is_new_head)
    vectors = None
    if is_new_head:
        config.codebook_size = config.codebook_size or saved.codebook_size
        config.code_seq_len = config.code_seq_len or saved.code_seq_len
        vectors = read_code_vectors(config, has_new_code_head=False)
    settings = build_backend_config(config, saved, code_vector_dim=_width(vectors))
    backend = build_saved_backend(folder, config=settings, dtype=config.backbone_dtype)
    if is_new_head:  # a code head that predicts vectors has its own among the weights
        hand_over_code_vectors(backend.action_head, vectors)
    config.codebook_size, config.code_seq_len = saved.codebook_size, saved.code_seq_len
    load_tensors(backend, folder / WEIGHTS, new_parts=(_HEAD,) if is_new_head else ())
    return backend


def _expect_same_backbone(config: HLRPConfig, built_on: str | None, folder: Path) -> None:
    if config.backbone is None or built_on is None:
        return
    expect(
        Path(config.backbone).name == Path(built_on).name,
        "backbone",
        f"{built_on}, on which the checkpoint {folder} was built",
        config.backbone,
        "Leave --policy.backbone out, as the checkpoint brings its own, or start afresh with --policy.type.",
    )


def _expect_same_code_head(config: HLRPConfig, saved: BackendConfig, folder: Path) -> None:
    heads = {name: code_head for (_, code_head), name in config.backends.items()}
    expect(
        heads.get(saved.name) == config.code_head,
        "code_head",
        f"{heads.get(saved.name)}, as in the checkpoint {folder}",
        config.code_head,
        "Leave --policy.code_head out, or train a new stage 2 with --policy.type.",
    )


def _expect_same_code_vectors(config: HLRPConfig, saved: BackendConfig, laq: dict[str, Any], folder: Path) -> None:
    """A saved head that predicts or decodes a LAQ's vectors cannot go on with the codes of another."""
    if saved.code_vector_dim is not None:
        head, next_step = "code head", "train a new stage 2"
    elif saved.action_head is not None and saved.action_head.code_vector_dim is not None:
        head, next_step = "action head", "start from a checkpoint without an action head (stage 2)"
    else:
        return
    expect(
        config.laq_hash == laq.get("hash"),
        "laq_hash",
        f"{laq.get('hash')}, the LAQ whose code vectors the {head} in {folder} has",
        config.laq_hash,
        f"Leave --policy.laq_hash out; for another LAQ {next_step}.",
    )


def fetch_folder(name: str | Path, **download: Any) -> Path:
    """The folder of a saved policy: a local one, or all of its parts from the Hub.

    Args:
        download: arguments of `huggingface_hub.snapshot_download`, such as `revision`.

    Raises:
        ValueError: no such folder, and none that the Hub gives us.
    """
    return fetch(
        name,
        "policy",
        expected="the folder `pretrained_model` of a checkpoint, or user/repository on the Hub",
        next_step="Check the path.",
        parts=["config.json", "hlrp.json", WEIGHTS, "backbone/*", f"{LAQ_FOLDER}/*", "policy_preprocessor*"],
        **download,
    )
