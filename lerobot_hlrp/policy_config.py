"""Settings that all policy types share: one dataclass, mapped onto the core's settings in one function.

A policy type adds its registered name and the backends it can be (`backends`). The core's own dataclasses are nested
here, never listed again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import (
    CosineAnnealingWithWarmupSchedulerConfig,
    CosineDecayWithWarmupSchedulerConfig,
    LRSchedulerConfig,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from hlrp_core.backends.config import BackendConfig
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import OBJECTIVES, BackendMode
from hlrp_core.heads import ACTION_HEADS, ActionHeadConfig
from hlrp_core.prompting.prompt import PromptConfig

DTYPES = ("float32", "bfloat16", "float16")

# Settings of an action head that stand in the policy's config under names of their own, or that the data decide.
_SET_ELSEWHERE = ("kind", "chunk_size", "action_dim", "state_dim", "code_conditioning")

ActionExpertConfig = make_dataclass(
    "ActionExpertConfig",
    [(f.name, f.type, field(default=f.default)) for f in fields(ActionHeadConfig) if f.name not in _SET_ELSEWHERE],
    module=ActionHeadConfig.__module__,  # where the names in the annotations mean something
)
ActionExpertConfig.__doc__ = "Size and training of the action head; the fields are those of `ActionHeadConfig`."


@dataclass
class HLRPConfig(PreTrainedConfig):
    """What a policy learns, from which labels, with which parts.

    Args:
        mode: `codes` (stage 2), `actions` (stage 3) or `multitask` (both losses).
        backbone: Hub id or folder of the pretrained vision-language model. A checkpoint brings its own.
        prompting: `chat` (the processor's template) or `plain`.
        code_head: how codes are predicted; `tokens` writes them as text.
        codebook_size, code_seq_len: K and S; by default those of the labels or of the checkpoint.
        image_size: pixels along an image's side as the backbone sees it. None: the processor's own settings.
        dtype: of mixed-precision computation. The weights of the heads stay float32.
        backbone_dtype: of the backbone's weights; below float32 only where memory demands it or the backbone is frozen.

        codes: a code table of this dataset; only frame t is read from the dataset.
        laq: folder or Hub id of a LAQ that labels frame pairs while training. Not together with `codes`.
        laq_id, laq_hash: which LAQ made the labels. Recorded, and compared with the labels of a later run.
        camera: whose frames the LAQ saw and the policy sees; by default the only one.
        extra_cameras: further views at time t that the policy sees, in all modes.
        frame_gap: dataset frames between the two frames of a pair; by default as in `codes` or `laq`.

        action_head: `mlp`, `flow` or `prefix_flow`; None for a policy that predicts codes alone.
        action_expert: size and training of the action head.
        code_conditioning: how codes reach the action head: `tokens`, `soft` or `none`. By default `none` for
            `prefix_flow` and `tokens` for the others.
        code_source: codes that a code-conditioned action head trains on: `predicted` or `teacher`.
        chunk_size: actions predicted at once.
        n_action_steps: actions run of each chunk before the next is predicted.
        action_episodes: episodes that may supervise actions; the others count as video without actions.
            None: all of them.
        action_episode_share: instead of a list, the share of the dataset's episodes that may; a larger share contains
            a smaller one of the same seed.
        action_episode_seed: of that draw.
        rtc_config: real-time chunking (flow heads). `lerobot-rollout` sets it; it is not saved.

        optimizer_*, scheduler_*: AdamW, and a warmup followed by cosine decay. `scheduler_decay_steps` None: to zero over
            the run's steps; else to `scheduler_decay_lr` in that many.
        backbone_lr_multiplier: of the backbone's learning rate, relative to the heads'.
    """

    backends: ClassVar[dict[tuple[str, str], str]] = {}
    """(prompting, code_head) -> name of the backend; each policy type has its own."""

    mode: str = "codes"
    backbone: str | None = None
    prompting: str = "chat"
    code_head: str = "tokens"
    codebook_size: int | None = None
    code_seq_len: int | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    token_scheme: TokenSchemeConfig = field(default_factory=TokenSchemeConfig)
    decoding: str = "constrained"
    image_size: int | None = None
    freeze_vision: bool = False
    freeze_backbone: bool = False
    codes_loss_weight: float = 1.0
    actions_loss_weight: float = 1.0
    dtype: str = "float32"
    backbone_dtype: str = "float32"

    codes: str | None = None
    laq: str | None = None
    laq_id: str | None = None
    laq_hash: str | None = None
    camera: str | None = None
    extra_cameras: list[str] = field(default_factory=list)
    frame_gap: int | None = None

    action_head: str | None = None
    action_expert: ActionExpertConfig = field(default_factory=ActionExpertConfig)  # type: ignore[valid-type]
    code_conditioning: str | None = None
    code_source: str = "predicted"
    chunk_size: int = 16
    n_action_steps: int = 8
    action_episodes: list[int] | None = None
    action_episode_share: float | None = None
    action_episode_seed: int = 0
    rtc_config: Any = None  # LeRobot's RTCConfig, whose module would import every policy of LeRobot

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-4
    optimizer_grad_clip_norm: float = 1.0
    backbone_lr_multiplier: float = 1.0
    scheduler_warmup_steps: int = 500
    scheduler_decay_steps: int | None = None
    scheduler_decay_lr: float = 2.5e-6

    push_to_hub: bool = False  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = [mode.value for mode in BackendMode]
        _check_choice("mode", self.mode, modes)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("backbone_dtype", self.backbone_dtype, DTYPES)
        if self.backends:
            _check_choice("prompting", self.prompting, sorted({prompting for prompting, _ in self.backends}))
            _check_choice("code_head", self.code_head, sorted({head for _, head in self.backends}))
        if self.action_head is not None:
            _check_choice("action_head", self.action_head, list(ACTION_HEADS))
        _check(
            not (self.codes and self.laq),
            "codes, laq",
            "one source of labels",
            f"both ({self.codes} and {self.laq})",
            "Leave one of --policy.codes and --policy.laq out.",
        )
        _check(
            self.action_episodes is None or self.action_episode_share is None,
            "action_episodes, action_episode_share",
            "one of them",
            "both",
            "Leave one of them out.",
        )
        share = self.action_episode_share
        _check(
            share is None or 0 < share <= 1, "action_episode_share", "above 0 and at most 1", share, "For example 0.1."
        )
        for name in ("chunk_size", "n_action_steps"):
            _check(getattr(self, name) >= 1, name, "1 or more", getattr(self, name), "Raise it.")
        _check(self.frame_gap is None or self.frame_gap >= 1, "frame_gap", "1 or more", self.frame_gap, "Raise it.")
        _check(
            self.n_action_steps <= self.chunk_size,
            "n_action_steps",
            f"at most chunk_size={self.chunk_size}",
            self.n_action_steps,
            "Lower it, or raise chunk_size.",
        )
        visual = self.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY)
        _check(
            visual is NormalizationMode.IDENTITY,
            "normalization_mapping of VISUAL",
            "IDENTITY, because the backbone's processor normalises images itself",
            visual,
            "Leave VISUAL out.",
        )

    # -- what the mode asks for -----------------------------------------------------------------------------------

    @property
    def objectives(self) -> tuple[str, ...]:
        return OBJECTIVES[BackendMode(self.mode)]

    @property
    def learns_actions(self) -> bool:
        return "actions" in self.objectives

    @property
    def needs_code_labels(self) -> bool:
        conditioned = self.action_head is not None and self.resolved_code_conditioning != "none"
        return "codes" in self.objectives or (self.learns_actions and conditioned and self.code_source == "teacher")

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Frame t alone, or the pair for an online teacher. LeRobot applies this to every `observation.*` key."""
        if self.laq is None or not self.needs_code_labels:
            return None  # the same frames as [0], decoded once instead of twice
        from lerobot_hlrp.label_sources import resolve_frame_gap

        return [0, resolve_frame_gap(self)]

    @property
    def action_delta_indices(self) -> list[int] | None:
        return list(range(self.chunk_size)) if self.learns_actions else None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> LRSchedulerConfig:
        if self.scheduler_decay_steps is None:
            return CosineAnnealingWithWarmupSchedulerConfig(num_warmup_steps=self.scheduler_warmup_steps)
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    # -- features -------------------------------------------------------------------------------------------------

    def validate_features(self) -> None:
        """Settle which cameras are used, and check that the data have what the mode learns.

        Raises:
            ValueError: no image, an unknown or ambiguous camera, or no actions to learn.
        """
        cameras = list(self.image_features)
        _check(
            bool(cameras),
            "features",
            "at least one camera (observation.images.*)",
            f"none among {sorted(self.input_features or {})}",
            "Use a dataset or environment with images.",
        )
        self.camera = self._find_camera(self.camera, cameras)
        self.extra_cameras = [self._find_camera(name, cameras) for name in self.extra_cameras]
        for name in self.cameras:
            channels = self.image_features[name].shape[0]
            _check(channels == 3, f"camera {name}", "3 colour channels", channels, "Choose an RGB camera.")
        _check(
            self.action_head is not None or not self.learns_actions,
            f"action_head with mode={self.mode}",
            f"one of {', '.join(ACTION_HEADS)}",
            None,
            "Set --policy.action_head.",
        )
        if self.learns_actions:
            _check(
                self.action_feature is not None,
                f"dataset for mode={self.mode}",
                "an 'action' column",
                f"none; it has {sorted(self.input_features or {})}",
                "Use a dataset with actions, or --policy.mode=codes.",
            )

    @property
    def cameras(self) -> list[str]:
        """All cameras in use, the LAQ's first."""
        return [name for name in (self.camera, *self.extra_cameras) if name is not None]

    def _find_camera(self, name: str | None, cameras: list[str]) -> str:
        """The feature key of a camera that is given by key, by its last part, or not at all."""
        if name is None:
            _check(
                len(cameras) == 1,
                "camera",
                "the name of one, as there are several",
                f"none of {', '.join(cameras)}",
                f"Set --policy.camera, for example to {cameras[0]}.",
            )
            return cameras[0]
        found = [key for key in cameras if name in (key, key.rsplit(".", 1)[-1], key.removeprefix("observation."))]
        _check(
            len(found) == 1,
            "camera",
            f"one of {', '.join(cameras)}",
            repr(name),
            "Choose one of these, or rename the dataset's with --rename_map.",
        )
        return found[0]

    def normalized_features(self) -> dict[str, PolicyFeature]:
        """State and action as the policy uses them; other features need no statistics."""
        found = {OBS_STATE: self.robot_state_feature, ACTION: self.action_feature}
        return {key: feature for key, feature in found.items() if feature is not None}

    def take_state_from(self, features: dict[str, PolicyFeature]) -> None:
        """Let a new action head see the state of the data it is trained on, whatever the checkpoint was trained on."""
        kept = {key: feature for key, feature in (self.input_features or {}).items() if key != OBS_STATE}
        state = features.get(OBS_STATE)
        is_state = state is not None and state.type is FeatureType.STATE
        self.input_features = {**kept, OBS_STATE: state} if is_state else kept

    # -- the core's settings --------------------------------------------------------------------------------------

    @property
    def resolved_code_conditioning(self) -> str:
        if self.code_conditioning is not None:
            return self.code_conditioning
        return "none" if self.action_head is None or ACTION_HEADS[self.action_head].needs_prefix else "tokens"

    @property
    def backend_name(self) -> str:
        return self.backends[self.prompting, self.code_head]

    def to_backend_config(self, saved: BackendConfig | None = None) -> BackendConfig:
        """The core's settings of this policy.

        Args:
            saved: settings of the checkpoint that is loaded. What its weights fix comes from there.

        Raises:
            ValueError: a size is not known, or settings do not fit each other or the checkpoint.
        """
        sizes = {}
        for name in ("codebook_size", "code_seq_len"):
            value = getattr(self, name) or getattr(saved, name, None)
            is_used = "codes" in self.objectives or self.resolved_code_conditioning != "none"
            _check(
                value is not None or not is_used,
                name,
                "a number, from the labels or the checkpoint",
                None,
                f"Set --policy.codes or --policy.laq, start from a checkpoint with --policy.path, or set --policy.{name}.",
            )
            sizes |= {name: value} if value is not None else {}  # a vocabulary that no one uses has the default size
        return BackendConfig(
            name=self.backend_name,
            image_size=self.image_size,
            prompt=self.prompt,
            token_scheme=self.token_scheme,
            decoding=self.decoding,
            action_head=self._to_action_head_config(saved.action_head if saved is not None else None),
            code_source=self.code_source,  # type: ignore[arg-type]
            codes_loss_weight=self.codes_loss_weight,
            actions_loss_weight=self.actions_loss_weight,
            freeze_vision=self.freeze_vision,
            freeze_backbone=self.freeze_backbone,
            **sizes,
        )

    def _to_action_head_config(self, saved: ActionHeadConfig | None) -> ActionHeadConfig | None:
        if self.action_head is None:
            return None
        action, state = self.action_feature, self.robot_state_feature
        _check(
            action is not None or saved is not None,
            f"data for action_head={self.action_head}",
            "an 'action' column",
            "none",
            "Use a dataset with actions, or leave --policy.action_head out until there is one.",
        )
        head = ActionHeadConfig(
            kind=self.action_head,
            chunk_size=self.chunk_size,
            action_dim=action.shape[0] if action is not None else saved.action_dim,  # type: ignore[union-attr]
            state_dim=state.shape[0] if state is not None else 0,
            code_conditioning=self.resolved_code_conditioning,  # type: ignore[arg-type]
            **{f.name: getattr(self.action_expert, f.name) for f in fields(ActionExpertConfig)},  # type: ignore[arg-type]
        )
        if saved is not None:
            _check_same_head(head, saved)
        return head

    # -- saving ---------------------------------------------------------------------------------------------------

    def portable(self) -> HLRPConfig:
        """A copy without what belongs to one run or one machine: paths, and the choice of labels.

        `train_config.json` keeps them, so that a run can be resumed.
        """
        config = copy.copy(self)
        for name in ("codes", "laq", "action_episodes", "action_episode_share", "rtc_config", "pretrained_path"):
            setattr(config, name, None)
        config.backbone = backbone_name(self.backbone)
        return config

    def _save_pretrained(self, save_directory: Path) -> None:
        PreTrainedConfig._save_pretrained(self.portable(), save_directory)


def backbone_name(backbone: str | None) -> str | None:
    """A Hub id as it is, a folder by its name alone."""
    if backbone is not None and Path(backbone).is_absolute():
        return Path(backbone).name
    return backbone


# Settings of an action head that its weights do not depend on.
_FREE_HEAD_SETTINGS = ("num_flow_steps", "num_noise_draws", "time_sampling", "dropout")


def _check_same_head(head: ActionHeadConfig, saved: ActionHeadConfig) -> None:
    free = {name: getattr(head, name) for name in _FREE_HEAD_SETTINGS}
    if head == replace(saved, **free):
        return
    differing = [f.name for f in fields(head) if getattr(head, f.name) != getattr(replace(saved, **free), f.name)]
    expected = ", ".join(f"{name}={getattr(saved, name)}" for name in differing)
    got = ", ".join(f"{name}={getattr(head, name)}" for name in differing)
    _check(
        False,
        "action head",
        f"{expected} as in the checkpoint",
        got,
        "Leave these settings out, use data with the same action and state, or start from a checkpoint without an "
        "action head (stage 2).",
    )


def _check(condition: bool, what: str, expected: str, got: Any, next_step: str) -> None:
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got}. Next step: {next_step}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    _check(value in choices, name, f"one of {', '.join(choices)}", repr(value), "Choose one of these.")
