"""Settings that all policy types share.

A policy type adds its registered name and the backends it can be (`backends`). The core's own dataclasses are nested
here, never listed again; `core_settings.py` maps everything onto the core. The comment above a field is its help text
on the command line.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode, PolicyFeature
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import (
    CosineAnnealingWithWarmupSchedulerConfig,
    CosineDecayWithWarmupSchedulerConfig,
    LRSchedulerConfig,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import OBJECTIVES, BackendMode
from hlrp_core.expectation import expect, expect_choice
from hlrp_core.heads import ACTION_HEADS, ActionExpertConfig
from hlrp_core.prompting.prompt import PromptConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class HLRPConfig(PreTrainedConfig):
    """What a policy learns, from which labels, with which parts.

    Raises:
        ValueError: a setting is out of range, or two do not fit each other.
    """

    backends: ClassVar[dict[tuple[str, str], str]] = {}
    """(prompting, code_head) -> name of the core's backend; each policy type has its own."""

    # What is learned: `codes` (stage 2), `actions` (stage 3) or `multitask` (both losses).
    mode: str = "codes"
    # Hub id or folder of the pretrained vision-language model. A checkpoint (--policy.path) brings its own.
    backbone: str | None = None
    # How the instruction becomes a prompt: `chat` (the processor's own template) or `plain`.
    prompting: str = "chat"
    # How codes are predicted: `tokens` writes them as text, `latent` reads them off the prompt's hidden states;
    # `vector` reads the LAQ's continuous code vectors off these.
    code_head: str = "tokens"
    # K, the codes that a position can take. By default that of the labels or of the checkpoint.
    codebook_size: int | None = None
    # S, the codes of one label. By default that of the labels or of the checkpoint.
    code_seq_len: int | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    token_scheme: TokenSchemeConfig = field(default_factory=TokenSchemeConfig)
    # How codes are read from the model (code_head=tokens): `constrained`, `generate` or `free`.
    decoding: str = "constrained"
    # What the loss on codes is a mean of (code_head=tokens): the whole `completion`, `codes_only`, or `restricted` to
    # the K code rows of the vocabulary at the code positions.
    code_objective: str = "completion"
    # How hidden states become codes (code_head=latent) or vectors (code_head=vector, by regression): from their `mean`,
    # the `last` one, or by a learned `query`.
    latent_pooling: str = "mean"
    # What is trained of the vocabulary's tables (code_head=tokens): `all` of them, or the `code_rows` alone.
    train_vocabulary: str = "all"
    # How vectors are learned (code_head=vector): `regression` of their mean, or a `flow` that draws them from noise.
    vector_objective: str = "regression"
    # Pixels along an image's side, as the backbone sees it. By default as the backbone's processor has it.
    image_size: int | None = None
    # An image as several tiles of `image_size` (hlrp_smolvlm, hlrp_smol_latent): sharper, and many times the tokens.
    image_splitting: bool = False
    # Keep the vision tower as it is.
    freeze_vision: bool = False
    # Keep the whole backbone as it is.
    freeze_backbone: bool = False
    # Weight of the code loss in mode=multitask.
    codes_loss_weight: float = 1.0
    # Weight of the action loss in mode=multitask.
    actions_loss_weight: float = 1.0
    # Precision of the computation; below float32 it is mixed, and the weights stay as they are.
    dtype: str = "float32"
    # Of the backbone's weights. Below float32 only where memory demands it, or with a frozen backbone.
    backbone_dtype: str = "float32"

    # Labels: a code table of this very dataset. Only frame t is read from the dataset then.
    codes: str | None = None
    # Labels: folder or Hub id of a LAQ that labels frame pairs while training. Not together with `codes`.
    laq: str | None = None
    # Recorded: the LAQ that made the labels.
    laq_id: str | None = None
    # Recorded, and compared with the labels of a later run: codes of another LAQ mean other things.
    laq_hash: str | None = None
    # Camera whose frames the LAQ saw and the policy sees, such as `top`. By default the only one.
    camera: str | None = None
    # Further cameras that the policy sees at time t, in every mode, such as `[wrist,side]`.
    extra_cameras: list[str] | str = field(default_factory=list)
    # Dataset frames between the two frames of a pair. By default as in the table or the LAQ. A LAQ that labels online
    # can be given another gap than its own, for a dataset with another frame rate.
    frame_gap: int | None = None
    # Recorded: the same in seconds, which a later run's labels are compared with, whatever its dataset's frame rate.
    frame_gap_s: float | None = None
    # Recorded: width of the LAQ's code vectors, where a head has them.
    code_vector_dim: int | None = None
    # Recorded: dataset frames from the first to the last that a label is made from; more than the gap with T > 2.
    label_span: int | None = None

    # `mlp`, `flow`, `prefix_flow` or `laq`; by default the policy predicts codes alone.
    action_head: str | None = None
    # Folder or Hub id of the LAQ whose code vectors a new code_head=vector or action_head=laq takes over, where `laq`
    # does not name it and the code table lacks them; and of the LAQ that draws (save_predicted_video).
    laq_weights: str | None = None
    # lerobot-eval with --eval.batch_size=1: beside each rollout a video of what the policy expects to see, drawn by the
    # LAQ from the codes that it predicts.
    save_predicted_video: bool = False
    action_expert: ActionExpertConfig = field(default_factory=ActionExpertConfig)
    # How codes reach the action head: `tokens`, `soft` or `none`; with code_head=vector: `vector` or `none`. By default
    # `none` for prefix_flow.
    code_conditioning: str | None = None
    # Codes that a code-conditioned action head trains on: `predicted`, as it will see them, or `teacher`.
    code_source: str = "predicted"
    # Actions predicted at once.
    chunk_size: int = 16
    # Actions run of each chunk before the next is predicted.
    n_action_steps: int = 8
    # Episodes that may supervise actions, such as [0,1,2]; the others count as video without actions. By default all.
    action_episodes: list[int] | None = None
    # Instead of a list: the share of the dataset's episodes. A larger share contains a smaller one of the same seed.
    action_episode_share: float | None = None
    # Seed of that draw.
    action_episode_seed: int = 0
    # Real-time chunking (flow heads): an RTCConfig of LeRobot, which lerobot-rollout sets. Not saved.
    rtc_config: Any = None

    # How state and action are normalised. Images are the backbone's own processor's business.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )

    # Peak learning rate; after the warmup it falls along a cosine.
    optimizer_lr: float = 1e-4
    # Learning rate of the backbone, relative to the heads'.
    backbone_lr_multiplier: float = 1.0
    # Of AdamW: decay of its two moving averages.
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    # Of AdamW: added to the denominator.
    optimizer_eps: float = 1e-8
    # Of AdamW.
    optimizer_weight_decay: float = 1e-4
    # Gradients are scaled down to this norm.
    optimizer_grad_clip_norm: float = 1.0
    # Steps of linear warmup.
    scheduler_warmup_steps: int = 500
    # Steps of the cosine decay to `scheduler_decay_lr`. By default it ends at 0 with the run.
    scheduler_decay_steps: int | None = None
    # Learning rate at the end of that decay, where `scheduler_decay_steps` is set.
    scheduler_decay_lr: float = 2.5e-6

    # Push the trained policy to `repo_id`.
    push_to_hub: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.extra_cameras, str):  # beside --policy.path LeRobot reads flags as JSON: [wrist] is text
            names = (name.strip(" \"'") for name in self.extra_cameras.strip("[] ").split(","))
            self.extra_cameras = [name for name in names if name]
        expect_choice("mode", self.mode, [mode.value for mode in BackendMode])
        expect_choice("dtype", self.dtype, DTYPES)
        expect_choice("backbone_dtype", self.backbone_dtype, DTYPES)
        if self.backends:  # the shared base has none
            expect_choice("prompting", self.prompting, sorted({prompting for prompting, _ in self.backends}))
            expect_choice("code_head", self.code_head, sorted({head for _, head in self.backends}))
            known = " or ".join(f"prompting={p} with code_head={h}" for p, h in self.backends)
            pair = (self.prompting, self.code_head)
            expect(pair in self.backends, "prompting, code_head", known, pair, "Choose one of these.")
        if self.action_head is not None:
            expect_choice("action_head", self.action_head, list(ACTION_HEADS))
        expect(
            not self.use_amp,
            "use_amp",
            "false, as the policy has a precision of its own in training and in evaluation",
            True,
            "Leave it out; --policy.dtype=bfloat16.",
        )
        expect(
            not self.freeze_backbone or self.code_rows_can_learn,
            "freeze_backbone",
            f"something in the backbone that learns codes as tokens in mode={self.mode}",
            "all of it frozen",
            "Leave it out (--policy.freeze_vision=true freezes a part), or train the rows of the code tokens: "
            "--policy.train_vocabulary=code_rows.",
        )
        self._check_labels()
        for name in ("chunk_size", "n_action_steps"):
            expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name), "Raise it.")
        expect(
            self.n_action_steps <= self.chunk_size,
            "n_action_steps",
            f"at most chunk_size={self.chunk_size}",
            self.n_action_steps,
            "Lower it, or raise chunk_size.",
        )
        visual = self.normalization_mapping.get("VISUAL", NormalizationMode.IDENTITY)
        expect(
            visual is NormalizationMode.IDENTITY,
            "normalization_mapping of VISUAL",
            "IDENTITY, because the backbone's processor normalises images itself",
            visual,
            "Leave VISUAL out.",
        )

    def _check_labels(self) -> None:
        expect(
            not (self.codes and self.laq),
            "codes, laq",
            "one source of labels",
            f"both ({self.codes} and {self.laq})",
            "Leave one of --policy.codes and --policy.laq out.",
        )
        expect(
            self.laq_weights is None or self.predicts_vectors or self.decodes_code_vectors or self.save_predicted_video,
            "laq_weights",
            "action_head=laq, code_head=vector or save_predicted_video=true beside it, which alone read it",
            f"action_head={self.action_head}, code_head={self.code_head}",
            "Leave --policy.laq_weights out; labels come from --policy.laq.",
        )
        expect(self.frame_gap is None or self.frame_gap >= 1, "frame_gap", "1 or more", self.frame_gap, "Raise it.")
        share = self.action_episode_share
        expect(
            self.action_episodes is None or share is None,
            "action_episodes, action_episode_share",
            "one of them",
            f"both ({self.action_episodes} and {share})",
            "Leave one of them out.",
        )
        expect(
            share is None or 0 < share <= 1, "action_episode_share", "above 0 and at most 1", share, "For example 0.1."
        )

    # -- what the mode asks for -----------------------------------------------------------------------------------

    @property
    def objectives(self) -> tuple[str, ...]:
        return OBJECTIVES[BackendMode(self.mode)]

    @property
    def learns_actions(self) -> bool:
        return "actions" in self.objectives

    @property
    def code_rows_can_learn(self) -> bool:
        """Whether a code loss, if the mode has one, finds anything to train beside a frozen backbone."""
        is_head = self.code_head != "tokens"  # which is no part of the backbone
        return is_head or "codes" not in self.objectives or self.train_vocabulary == "code_rows"

    @property
    def reads_state(self) -> bool:
        """Whether the state is an input of the mode's training: of an action head, or of the prompt."""
        return self.learns_actions or self.prompt.state_text

    @property
    def needs_code_labels(self) -> bool:
        return "codes" in self.objectives or (
            self.learns_actions and self.resolved_code_conditioning != "none" and self.code_source == "teacher"
        )

    @property
    def uses_codes(self) -> bool:
        """Whether this policy learns, predicts or is conditioned on codes at all."""
        return "codes" in self.objectives or self.resolved_code_conditioning != "none"

    @property
    def resolved_code_conditioning(self) -> str:
        if self.code_conditioning is not None:
            return self.code_conditioning
        if self.action_head is None or ACTION_HEADS[self.action_head].needs_prefix:
            return "none"
        return "vector" if self.predicts_vectors else "tokens"

    @property
    def predicts_vectors(self) -> bool:
        return self.code_head == "vector"

    @property
    def decodes_code_vectors(self) -> bool:
        """Whether the action head has a table of the LAQ's vectors; predicted vectors it takes as they are."""
        if self.action_head is None or self.predicts_vectors:
            return False
        return ACTION_HEADS[self.action_head].needs_code_vectors

    # -- what LeRobot asks for ------------------------------------------------------------------------------------

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Frame t alone, or those of an online teacher. LeRobot applies this to every `observation.*` key."""
        if self.laq is None or not self.needs_code_labels:
            return None  # the same frames as [0], decoded once instead of twice
        from lerobot_hlrp.label_sources import read_frame_offsets

        return read_frame_offsets(self.laq, self.frame_gap)

    @property
    def action_delta_indices(self) -> list[int] | None:
        return list(range(self.chunk_size)) if self.learns_actions else None

    @property
    def drop_n_last_frames(self) -> int:
        """Frames at an episode's end that LeRobot's sampler leaves out: those whose label would cross it."""
        return (self.label_span or 0) if self.objectives == ("codes",) else 0

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

    def validate_features(self) -> None:
        """Settle which cameras are used, and check that the data have what the mode learns. See `features.py`."""
        from lerobot_hlrp.features import settle_features

        settle_features(self)

    @property
    def cameras(self) -> list[str]:
        """Keys of all cameras in use, the LAQ's first; settled by `validate_features`."""
        return [name for name in (self.camera, *self.extra_cameras) if name is not None]

    def normalized_features(self) -> dict[str, PolicyFeature]:
        """State and action, where the policy uses them; other features need no statistics."""
        found = {}
        if self.reads_state:
            found[OBS_STATE] = self.robot_state_feature
        if self.learns_actions:
            found[ACTION] = self.action_feature
        return {key: feature for key, feature in found.items() if feature is not None}

    # -- saving ---------------------------------------------------------------------------------------------------

    def portable(self) -> HLRPConfig:
        """A copy without what belongs to one run or one machine: paths, and which labels a run may use.

        `train_config.json` keeps them, so that a run can be resumed.
        """
        config = copy.copy(self)
        paths = ("codes", "laq", "laq_weights", "pretrained_path")
        for name in (*paths, "action_episodes", "action_episode_share", "rtc_config"):
            setattr(config, name, None)
        config.backbone = backbone_name(self.backbone)
        return config

    def _save_pretrained(self, save_directory: Path) -> None:
        PreTrainedConfig._save_pretrained(self.portable(), save_directory)


def backbone_name(backbone: str | None) -> str | None:
    """A Hub id as it is, a folder by its name alone."""
    if backbone is not None and (Path(backbone).is_absolute() or Path(backbone).is_dir()):
        return Path(backbone).name
    return backbone
