"""The policy that all types share: a backend of the core, dressed for LeRobot.

It reads LeRobot batches, finds the labels, and hands both to the backend; losses, modes and decoding are the core's. A
saved policy is one folder that LeRobot loads, and that `hlrp_core.bundle.load_backend` loads just as well.

Shape legend: B batch, T frames in time, C chunk length, A action width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.constants import OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from safetensors.torch import save_file
from torch import Tensor

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.bundle import (
    WEIGHTS,
    build_saved_backend,
    config_from_dict,
    load_tensors,
    read_manifest,
    save_parts,
    unique_tensors,
)
from hlrp_core.contract import ActionBatch, BackendMode, LatentOutput, SamplingOptions
from hlrp_core.registry import make_backend
from lerobot_hlrp.action_labels import check_statistics, choose_action_episodes, restrict_statistics
from lerobot_hlrp.batch import (
    Batch,
    check_finite,
    read_actions,
    read_frames,
    read_instructions,
    read_state,
    select_rows,
)
from lerobot_hlrp.label_sources import open_label_source
from lerobot_hlrp.policy_config import HLRPConfig, backbone_name

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

logger = logging.getLogger(__name__)

_PREFIX = "backend."  # of the policy's tensors; the saved ones go without, as the core names them
_HEAD = "action_head."


class HLRPPolicy(PreTrainedPolicy):
    """A LeRobot policy around one backend.

    Args:
        config: its features are filled in by LeRobot's `make_policy`.
        backend: an already loaded one; by default it is built on `config.backbone`.
        dataset_meta: of the dataset to train on; labels are checked against it, and its statistics are narrowed to the
            episodes that may supervise actions.

    Raises:
        ValueError: the data lack what the mode learns, or the labels do not fit them.
    """

    config_class = HLRPConfig
    name = "hlrp"
    config: HLRPConfig  # type: ignore[assignment]

    def __init__(
        self,
        config: HLRPConfig,
        *,
        backend: ComposedBackend | None = None,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        **_: Any,  # LeRobot passes further things, such as `dataset_stats`
    ):
        super().__init__(config)
        config.validate_features()
        self._labels = open_label_source(config, dataset_meta)
        self._action_episodes = self._claim_action_episodes(dataset_meta)
        self.backend = _build_backend(config) if backend is None else backend
        self.backend.setup(device=torch.device(config.device or "cpu"))
        # FSDP wraps by these names
        self._no_split_modules = [*(self.backend.core.model._no_split_modules or []), "ExpertLayer"]
        self.init_rtc_processor()
        self.reset()

    def _claim_action_episodes(self, meta: LeRobotDatasetMetadata | None) -> Tensor | None:
        """`[N]` episodes that may supervise actions; None for all. Narrows the dataset's statistics to them."""
        if meta is None or not self.config.learns_actions:
            return None
        episodes = choose_action_episodes(self.config, meta.total_episodes)
        if episodes is not None:
            restrict_statistics(meta, episodes)
            logger.info("Actions supervise in %d of %d episodes: %s", len(episodes), meta.total_episodes, episodes)
        check_statistics(meta.stats, self.config.normalized_features(), self.config.normalization_mapping)
        return None if episodes is None else torch.tensor(episodes)

    # -- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The mode's loss, and metrics as plain floats.

        Args:
            batch: a preprocessed LeRobot batch; it is not changed.
            reduction: `mean` for a scalar, `none` for `[B]`.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
        output = self.backend.loss_from_batch(self.build_training_batch(batch), mode=BackendMode(self.config.mode))
        loss = output.loss if reduction == "mean" else output.per_sample
        assert loss is not None
        return loss, {"loss": float(output.loss.detach()), **output.metrics}

    def build_training_batch(self, batch: Batch) -> ActionBatch:
        """Observation and labels as the backend learns from them; frames after t stay with the teacher."""
        frames = self._read_frames(batch)
        codes = codes_valid = actions = is_pad = action_valid = None
        if self.config.needs_code_labels:
            codes, codes_valid = self._read_codes(batch, frames)
        if self.config.learns_actions:
            action_valid = self._read_action_valid(batch)
            actions, is_pad = read_actions(batch, chunk_size=self.config.chunk_size, action_valid=action_valid)
        return ActionBatch(
            frames=frames[:, :1],
            instructions=read_instructions(batch, len(frames)),
            target_codes=codes,
            codes_valid=codes_valid,
            state=self._read_state(batch, action_valid) if self.config.learns_actions else None,
            actions=actions,
            action_is_pad=is_pad,
            action_valid=action_valid,
            views=self._read_views(batch),
        )

    def _read_frames(self, batch: Batch) -> Tensor:
        assert self.config.camera is not None  # settled by validate_features
        return read_frames(batch, self.config.camera)

    def _read_views(self, batch: Batch) -> dict[str, Tensor]:
        return {name: read_frames(batch, name)[:, 0] for name in self.config.extra_cameras}

    def _read_codes(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        if self._labels is None:
            raise ValueError(
                f"labels for mode={self.config.mode}: expected a source of codes, got none. Next step: set --policy.codes "
                "to a code table of the dataset, or --policy.laq to a LAQ."
            )
        return self._labels.label(batch, frames)

    def _read_action_valid(self, batch: Batch) -> Tensor | None:
        if self._action_episodes is None:
            return None
        episodes = batch["episode_index"].flatten()
        return torch.isin(episodes, self._action_episodes.to(episodes.device))

    def _read_state(self, batch: Batch, action_valid: Tensor | None) -> Tensor | None:
        head = self.backend.action_head
        if head is None or not head.needs_state:
            return None
        state = select_rows(read_state(batch, head.config.state_dim), action_valid)
        check_finite(state.isfinite(), OBS_STATE, batch)
        return state

    def get_optim_params(self) -> Any:
        """Parameters to train; two groups where the backbone has a learning rate of its own."""
        params = [p for p in self.parameters() if p.requires_grad]
        if self.config.backbone_lr_multiplier == 1:
            return params
        of_backbone = [p for p in self.backend.core.parameters() if p.requires_grad]
        known = {id(p) for p in of_backbone}
        groups = [
            {"params": of_backbone, "lr": self.config.optimizer_lr * self.config.backbone_lr_multiplier},
            {"params": [p for p in params if id(p) not in known]},
        ]
        return [group for group in groups if group["params"]]

    # -- prediction -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the actions that are not run yet; called whenever the environment is reset."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action `[B, A]` float32, normalised; predicts a new chunk every `n_action_steps` calls."""
        if not self._queue:
            actions = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(actions.transpose(0, 1)[: self.config.n_action_steps])  # (steps, B, A)
        return self._queue.popleft()

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        generator: torch.Generator | None = None,
        **_: Any,
    ) -> Tensor:
        """A chunk of actions `[B, C, A]` float32, normalised; the postprocessor brings them back to the robot's units.

        Args:
            batch: a preprocessed observation.
            noise: `[B, C, A]` starting noise of a flow head.
            inference_delay: real-time chunking: actions of the old chunk that run while this one is computed.
            prev_chunk_left_over: real-time chunking: `[B, C', A]` or `[C', A]`, the rest of the old chunk, normalised.
            execution_horizon: real-time chunking: by default that of `config.rtc_config`.
            generator: source of the noise.

        Raises:
            ValueError: the policy predicts codes alone, or the observation lacks something.
        """
        self._expect_action_head()
        sampling = SamplingOptions(noise=noise, generator=generator)
        if self._rtc_enabled and prev_chunk_left_over is not None:
            assert self.rtc_processor is not None
            left_over = prev_chunk_left_over if prev_chunk_left_over.ndim == 3 else prev_chunk_left_over[None]
            sampling = replace(
                sampling,
                inference_delay=inference_delay,
                prev_chunk_left_over=left_over,
                execution_horizon=execution_horizon,
                guidance=self.rtc_processor.denoise_step,
            )
        with self._autocast():
            return self.backend.predict_action_chunk(self._build_observation(batch), sampling=sampling).actions

    def predict_codes(self, batch: dict[str, Any], sampling: SamplingOptions | None = None) -> LatentOutput:
        """Codes for a preprocessed batch, from frame t and the instruction."""
        with self._autocast():
            return self.backend.latent_from_batch(
                self._build_observation(batch), mode=BackendMode.CODES, sampling=sampling
            )

    def _build_observation(self, batch: Batch) -> ActionBatch:
        frames = self._read_frames(batch)[:, :1]
        return ActionBatch(
            frames=frames,
            instructions=read_instructions(batch, len(frames)),
            state=self._read_state(batch, None),
            views=self._read_views(batch),
        )

    def _expect_action_head(self) -> None:
        if self.backend.action_head is None:
            raise ValueError(
                f"actions: expected a policy with an action head, got '{self.name}' in mode={self.config.mode}, which "
                "predicts codes alone. Next step: train it for actions with lerobot-train --policy.path=<this checkpoint> "
                "--policy.mode=actions --policy.action_head=prefix_flow."
            )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """The precision of training; lerobot-eval does not look at `dtype`."""
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.backend.core.device.type, dtype=dtype, enabled=dtype != torch.float32):
            yield

    # -- real-time chunking ---------------------------------------------------------------------------------------

    def supports_rtc(self) -> bool:
        head = self.backend.action_head
        return head is not None and head.supports_guidance

    def init_rtc_processor(self) -> None:
        """Called again by LeRobot when it changes `config.rtc_config`."""
        config = self.config.rtc_config
        self.rtc_processor = RTCProcessor(config) if config is not None else None

    @property
    def _rtc_enabled(self) -> bool:
        return self.config.rtc_config is not None and self.config.rtc_config.enabled

    # -- saving and loading ---------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and the backend's bundle.

        Args:
            state_dict: a gathered one of the whole policy, where its own would be sharded.
        """
        self.config._save_pretrained(save_directory)
        save_parts(self.backend, save_directory, extra=self._provenance())
        tensors = unique_tensors(self.backend)
        if state_dict is not None:
            gathered = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
            tensors = {name: gathered[name].detach().cpu().contiguous() for name in tensors}
        save_file(tensors, save_directory / WEIGHTS, metadata={"format": "pt"})

    def _provenance(self) -> dict[str, Any]:
        config = self.config
        episodes = None if self._action_episodes is None else self._action_episodes.tolist()
        return {
            "backbone": backbone_name(config.backbone),
            "laq": {"id": config.laq_id, "hash": config.laq_hash, "frame_gap": config.frame_gap},
            "camera": config.camera,
            "action_episodes": episodes,
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: HLRPConfig | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        strict: bool = True,
        dataset_meta: LeRobotDatasetMetadata | None = None,
        **kwargs: Any,
    ) -> HLRPPolicy:
        """Load a saved policy, in evaluation mode. Loading is always strict and opens nothing outside the folder.

        Args:
            pretrained_name_or_path: folder, or repository on the Hub.
            config: with other settings than the saved ones; an action head that it adds starts from fresh weights.
            strict: there is no other way.
            dataset_meta: of a dataset to train on.

        Raises:
            BundleError: a part is missing or altered, or the schema is not known.
            ValueError: settings do not fit the checkpoint.
        """
        if not strict:
            raise ValueError("strict: expected True, got False. Next step: leave it out; loading is always strict.")
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_name_or_path),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=["*.json", WEIGHTS, "backbone/*"],
                    ignore_patterns=["checkpoints/*"],
                )
            )
        config = PreTrainedConfig.from_pretrained(folder) if config is None else config  # type: ignore[assignment]
        assert isinstance(config, cls.config_class)
        backend = _load_backend(folder, config, dataset_meta)
        policy = cls(config, backend=backend, dataset_meta=dataset_meta, **kwargs)
        return policy.eval()


def _build_backend(config: HLRPConfig) -> ComposedBackend:
    """A backend on the pretrained backbone that the config names."""
    if config.backbone is None:
        raise ValueError(
            "backbone: expected a Hub id or a folder with a Hugging Face checkpoint, got none. Next step: set "
            "--policy.backbone, or start from a checkpoint with --policy.path."
        )
    settings = vars(config.to_backend_config()).copy()
    config.codebook_size, config.code_seq_len = settings["codebook_size"], settings["code_seq_len"]
    return make_backend(settings.pop("name"), backbone=config.backbone, dtype=config.backbone_dtype, **settings)


def _load_backend(folder: Path, config: HLRPConfig, dataset_meta: LeRobotDatasetMetadata | None) -> ComposedBackend:
    """The backend of a saved folder, with the parts that the config adds to it."""
    manifest = read_manifest(folder)
    saved = config_from_dict(manifest["backend"])
    built_on = manifest["extra"].get("backbone")
    if config.backbone is not None and backbone_name(config.backbone) != built_on:
        raise ValueError(
            f"backbone: expected {built_on}, on which the checkpoint {folder} was built, got {config.backbone}. Next step: "
            "leave --policy.backbone out, as the checkpoint brings its own, or start afresh with --policy.type."
        )
    is_new_head = saved.action_head is None
    if is_new_head and dataset_meta is not None:
        config.take_state_from(dataset_to_policy_features(dataset_meta.features))
    backend = build_saved_backend(folder, config=config.to_backend_config(saved))
    config.codebook_size, config.code_seq_len = saved.codebook_size, saved.code_seq_len
    load_tensors(backend, folder / WEIGHTS, new_parts=(_HEAD,) if is_new_head else ())
    return backend
