"""From a policy's config to the core's settings: the one place where they meet."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from hlrp_core.backends.config import BackendConfig
from hlrp_core.expectation import expect
from hlrp_core.heads import ActionExpertConfig, ActionHeadConfig

if TYPE_CHECKING:
    from lerobot_hlrp.policy_config import HLRPConfig

# Settings of an action head that its weights do not depend on.
_FREE_HEAD_SETTINGS = ("num_flow_steps", "num_noise_draws", "time_sampling", "dropout")


def build_backend_config(
    config: HLRPConfig, saved: BackendConfig | None = None, *, code_vector_dim: int | None = None
) -> BackendConfig:
    """The core's settings of a policy.

    Args:
        config: with its features settled, and its code sizes filled in from the labels.
        saved: settings of the checkpoint that is loaded; sizes that its weights fix come from there.
        code_vector_dim: width of the LAQ's code vectors, for a new head that predicts or decodes them.

    Raises:
        ValueError: a size is not known, or settings do not fit each other or the checkpoint.
    """
    predicted_dim = None
    if config.predicts_vectors:
        predicted_dim = code_vector_dim if saved is None else saved.code_vector_dim
        code_vector_dim = predicted_dim
    return BackendConfig(
        name=config.backends[config.prompting, config.code_head],
        codebook_size=_code_size(config, "codebook_size", saved),
        code_seq_len=_code_size(config, "code_seq_len", saved),
        image_size=config.image_size,
        image_splitting=config.image_splitting,
        prompt=config.prompt,
        token_scheme=config.token_scheme,
        decoding=config.decoding,
        code_objective=config.code_objective,  # type: ignore[arg-type]
        latent_pooling=config.latent_pooling,  # type: ignore[arg-type]
        train_vocabulary=config.train_vocabulary,  # type: ignore[arg-type]
        vector_objective=config.vector_objective,  # type: ignore[arg-type]
        code_vector_dim=predicted_dim,
        action_head=_build_head_config(config, saved.action_head if saved is not None else None, code_vector_dim),
        code_source=config.code_source,  # type: ignore[arg-type]
        codes_loss_weight=config.codes_loss_weight,
        actions_loss_weight=config.actions_loss_weight,
        freeze_vision=config.freeze_vision,
        freeze_backbone=config.freeze_backbone,
    )


def _code_size(config: HLRPConfig, name: str, saved: BackendConfig | None) -> int:
    size = getattr(config, name) or getattr(saved, name, None)
    expect(
        size is not None or not config.uses_codes,
        name,
        "a number, from the labels or the checkpoint",
        None,
        f"Set --policy.codes or --policy.laq, start from a checkpoint with --policy.path, or set --policy.{name}.",
    )
    return size or getattr(BackendConfig(), name)  # a vocabulary that no one uses has the default size


def _build_head_config(
    config: HLRPConfig, saved: ActionHeadConfig | None, code_vector_dim: int | None
) -> ActionHeadConfig | None:
    if config.action_head is None:
        return None
    action, state = config.action_feature, config.robot_state_feature
    expect(
        action is not None or saved is not None,
        f"data for action_head={config.action_head}",
        "an 'action' column",
        None,
        "Use a dataset with actions, or leave --policy.action_head out until there is one.",
    )
    head = ActionHeadConfig(
        kind=config.action_head,
        chunk_size=config.chunk_size,
        action_dim=action.shape[0] if action is not None else saved.action_dim,  # type: ignore[union-attr]
        state_dim=state.shape[0] if state is not None else 0,
        code_conditioning=config.resolved_code_conditioning,  # type: ignore[arg-type]
        code_vector_dim=code_vector_dim if saved is None else saved.code_vector_dim,
        **{f.name: getattr(config.action_expert, f.name) for f in fields(ActionExpertConfig)},
    )
    if saved is not None:
        _expect_same_head(head, saved)
    return head


def _expect_same_head(head: ActionHeadConfig, saved: ActionHeadConfig) -> None:
    saved = replace(saved, **{name: getattr(head, name) for name in _FREE_HEAD_SETTINGS})
    differing = [f.name for f in fields(head) if getattr(head, f.name) != getattr(saved, f.name)]
    expect(
        not differing,
        "action head",
        ", ".join(f"{name}={getattr(saved, name)}" for name in differing) + " as in the checkpoint",
        ", ".join(f"{name}={getattr(head, name)}" for name in differing),
        "Leave these settings out and use data with the same action and state, or start from a checkpoint without an "
        "action head (stage 2).",
    )
