"""The policy that all types share: a backend of the core, dressed for LeRobot.

It reads LeRobot batches, finds the labels, and hands both to the backend; losses, modes and decoding are the core's. A
saved policy is one folder that LeRobot loads, and that `hlrp_core.bundle.load_backend` loads just as well.

Shape legend: B batch, C chunk length, A action width.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.bundle import save_parts, save_tensors, unique_names, unique_tensors
from hlrp_core.contract import BackendMode, LatentOutput, SamplingOptions
from hlrp_core.expectation import expect, expect_choice
from lerobot_hlrp.action_labels import (
    SupervisionWatch,
    check_statistics,
    choose_action_episodes,
    restrict_statistics,
)
from lerobot_hlrp.batch import BatchReader, missing_labels
from lerobot_hlrp.checkpoint import build_new_backend, fetch_folder, load_saved_backend
from lerobot_hlrp.label_sources import open_label_source
from lerobot_hlrp.policy_config import HLRPConfig, backbone_name
from lerobot_hlrp.preview import open_preview, to_video

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

logger = logging.getLogger(__name__)


class HLRPPolicy(PreTrainedPolicy):
    """A LeRobot policy around one backend.

    Args:
        config: its features are filled in by LeRobot's `make_policy`.
        backend: an already loaded one; by default it is built on `config.backbone`.
        dataset_meta: of the dataset to train on. Labels are checked against it, and its statistics are narrowed to
            the episodes that may supervise actions.
        saved_in: the folder that `backend` was loaded from.

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
        saved_in: Path | None = None,
        **_: Any,  # LeRobot passes further things, such as `dataset_stats`
    ):
        super().__init__(config)
        config.validate_features()
        labels = open_label_source(config, dataset_meta)
        episodes, self._supervision = None, None
        if dataset_meta is not None:
            # A saved policy may be loaded beside a dataset to act alone, without labels.
            if backend is None and config.needs_code_labels and labels is None:
                raise missing_labels(config)
            episodes = _claim_action_episodes(config, dataset_meta)
            if episodes is not None:
                self._supervision = SupervisionWatch(episodes, dataset_meta.episodes["length"][:])
            check_statistics(dataset_meta.stats, config.normalized_features(), config.normalization_mapping)
        self.backend = build_new_backend(config) if backend is None else backend
        self.backend.setup(device=torch.device(config.device or "cpu"))
        if config.extra_cameras:
            self.backend.prompting.check_length_sources(len(config.cameras))
        self.reader = BatchReader(
            config,
            state_dim=_state_dim(config, self.backend),
            labels=labels,
            action_episodes=episodes,
        )
        self.preview = open_preview(config, saved_in)
        self.last_predicted_latents: Tensor | None = None  # LeRobot collects it after each `select_action`
        self._tensor_names = unique_names(self.backend)  # before anything wraps or shards the modules
        self._no_split_modules = self._layer_classes()
        # what each loss reports, in this order
        reported = {"codes": ("codes_loss", *self.backend.code_head.metric_names), "actions": ("actions_loss",)}
        self._metrics = {name: 0.0 for objective in config.objectives for name in reported[objective]}
        self.init_rtc_processor()
        self.reset()

    def _layer_classes(self) -> list[str]:
        """Names of the classes that FSDP wraps one by one; a name that is not there would be an error to it."""
        repeated = {*(self.backend.core.model._no_split_modules or ()), "ExpertLayer"}
        return sorted(repeated & {type(module).__name__ for module in self.modules()})

    # -- training -------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """The mode's loss, and metrics as plain floats.

        Args:
            batch: a preprocessed LeRobot batch; it is not changed.
            reduction: `mean` for a scalar, `none` for `[B]`.
        """
        expect_choice("reduction", reduction, ("mean", "none"))
        labelled = self.reader.read_training(batch, is_held_out=not self.training)
        if self._supervision is not None and self.training:
            self._supervision.see(labelled.actions_mask())
        output = self.backend.loss_from_batch(labelled, mode=BackendMode(self.config.mode))
        loss = output.loss if reduction == "mean" else output.per_sample
        assert loss is not None
        # Always the same keys: LeRobot reduces them over processes by position. What a batch has no label for keeps its
        # last value; the loss of 0 that it adds would only pull the logged average down.
        masks = {"codes_loss": labelled.codes_mask(), "actions_loss": labelled.actions_mask()}
        is_measured = {name: bool(mask.any()) for name, mask in masks.items()}
        self._metrics |= {name: x for name, x in output.metrics.items() if is_measured.get(name, True)}
        return loss, dict(self._metrics)

    def get_optim_params(self) -> Any:
        """Parameters to train; two groups where the backbone has a learning rate of its own."""
        params = [p for p in self.parameters() if p.requires_grad]
        if self.config.backbone_lr_multiplier == 1:
            return params
        of_backbone = [p for p in self.backend.core.parameters() if p.requires_grad]
        known = {id(p) for p in of_backbone}
        groups = [
            {"params": [p for p in params if id(p) not in known]},
            {"params": of_backbone, "lr": self.config.optimizer_lr * self.config.backbone_lr_multiplier},
        ]
        return [group for group in groups if group["params"]]

    # -- prediction -----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the actions that have not run yet; called whenever the environment is reset."""
        self._queue: deque[Tensor] = deque(maxlen=self.config.n_action_steps)

    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action `[B, A]` float32, normalised; predicts a new chunk every `n_action_steps` calls."""
        if not self._queue:
            actions = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(actions.transpose(0, 1)[: self.config.n_action_steps])  # (steps, B, A)
        if self.preview is not None:
            frames = self.reader.read_observation(batch).frames[:, 0]
            self.last_predicted_latents = self.preview.draw(frames, self.predict_codes(batch))
        return self._queue.popleft()

    def decode_predicted_latents(self, latents: Tensor) -> Tensor:
        """The `last_predicted_latents` of a rollout `[B, 3, steps, R, T * R]` as video `[steps, R, T * R, 3]` uint8."""
        return to_video(latents)

    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A chunk of actions `[B, C, A]` float32, normalised; the postprocessor turns them into the robot's units.

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
        expect(
            self.backend.action_head is not None,
            "actions",
            "a policy with an action head",
            f"one of mode={self.config.mode} that predicts codes alone",
            "Train it for actions: lerobot-train --policy.path=<this checkpoint> --policy.mode=actions "
            "--policy.action_head=prefix_flow.",
        )
        rtc = {}
        if self.rtc_processor is not None and prev_chunk_left_over is not None:
            left_over = prev_chunk_left_over if prev_chunk_left_over.ndim == 3 else prev_chunk_left_over[None]
            rtc = {
                "inference_delay": inference_delay,
                # LeRobot pads it to its execution horizon, which may be longer than a chunk
                "prev_chunk_left_over": left_over[:, : self.config.chunk_size],
                "execution_horizon": execution_horizon,
                "guidance": self.rtc_processor.denoise_step,
            }
        sampling = SamplingOptions(noise=noise, generator=generator, **rtc)
        with self._precision():
            return self.backend.predict_action_chunk(self.reader.read_observation(batch), sampling=sampling).actions

    def predict_codes(self, batch: dict[str, Any], sampling: SamplingOptions | None = None) -> LatentOutput:
        """Codes or vectors for a preprocessed batch, from frame t and the instruction alone."""
        observation = self.reader.read_observation(batch)
        with self._precision():
            return self.backend.latent_from_batch(observation, mode=BackendMode.CODES, sampling=sampling)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The precision of training: `lerobot-eval` looks at `use_amp` alone."""
        if self.config.dtype == "float32":
            yield  # whatever the caller has set
        else:
            with torch.autocast(self.backend.core.device.type, dtype=getattr(torch, self.config.dtype)):
                yield

    # -- what LeRobot asks ----------------------------------------------------------------------------------------

    def supports_rtc(self) -> bool:
        head = self.backend.action_head
        return head is not None and head.supports_guidance

    def init_rtc_processor(self) -> None:
        """Follow `config.rtc_config`; LeRobot calls it after changing that."""
        config = self.config.rtc_config
        if isinstance(config, dict):  # from the command line: the setting has no type there
            config = self.config.rtc_config = RTCConfig(**config)
        self.rtc_processor = RTCProcessor(config) if config is not None and config.enabled else None

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """Adapters on the language model; what is new in it, and the action head, is trained and saved whole."""
        whole = []
        if "codes" in self.config.objectives:
            # codes as tokens are rows of the vocabulary; a latent head has weights of its own
            has_own_weights = any(True for _ in self.backend.code_head.parameters())
            tables = ["embed_tokens", "lm_head"] if self.config.train_vocabulary == "all" else ["code_rows"]
            whole += ["code_head"] if has_own_weights else tables
        if self.backend.action_head is not None:
            whole.append("action_head")
        projections = "(q|k|v|o|gate|up|down)_proj"
        return {
            "target_modules": rf".*\.(language_model|text_model)\..*\.{projections}",
            "modules_to_save": whole,
        }

    # -- saving and loading ---------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `config.json` and the backend's bundle.

        Args:
            state_dict: of the whole policy, where this process alone holds a part of it.
        """
        self.config._save_pretrained(save_directory)
        save_parts(self.backend, save_directory, extra=self._provenance())
        if self.preview is not None:
            self.preview.save(save_directory)
        if state_dict is None:
            tensors = unique_tensors(self.backend)
        else:
            tensors = {name: state_dict[f"backend.{name}"].cpu().contiguous() for name in self._tensor_names}
        save_tensors(tensors, save_directory)

    def _provenance(self) -> dict[str, Any]:
        config, episodes = self.config, self.reader.action_episodes
        return {
            "backbone": backbone_name(config.backbone),
            "laq": {"id": config.laq_id, "hash": config.laq_hash, "frame_gap": config.frame_gap},
            "camera": config.camera,
            "action_episodes": None if episodes is None else episodes.tolist(),
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
        dataset_meta: LeRobotDatasetMetadata | None = None,
        **kwargs: Any,
    ) -> HLRPPolicy:
        """Load a saved policy, in evaluation mode. Always strict, and nothing outside the folder is opened.

        Args:
            pretrained_name_or_path: folder, or repository on the Hub.
            config: with other settings than the saved ones; an action head that it adds starts from fresh weights.
            dataset_meta: of a dataset to train on.

        Raises:
            BundleError: a part is missing or altered, or the schema is not known.
            ValueError: settings do not fit the checkpoint.
        """
        folder = fetch_folder(
            pretrained_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        loaded = PreTrainedConfig.from_pretrained(folder) if config is None else config
        if not isinstance(loaded, cls.config_class):
            raise ValueError(
                f"{folder}: expected a policy of type '{cls.name}', got '{loaded.type}'. Next step: load it with the "
                "class of its type, or with LeRobot's make_policy."
            )
        backend = load_saved_backend(folder, loaded, dataset_meta)
        return cls(loaded, backend=backend, dataset_meta=dataset_meta, saved_in=folder, **kwargs).eval()


def _state_dim(config: HLRPConfig, backend: ComposedBackend) -> int:
    """Width of the state that the policy sees; 0 for none."""
    if config.prompt.state_text:
        assert config.robot_state_feature is not None  # settled by validate_features
        return config.robot_state_feature.shape[0]
    return 0 if backend.action_head is None else backend.action_head.config.state_dim


def _claim_action_episodes(config: HLRPConfig, meta: LeRobotDatasetMetadata) -> list[int] | None:
    """Episodes that may supervise actions; None for all. Narrows the dataset's statistics to them."""
    if not config.learns_actions:
        return None
    episodes = choose_action_episodes(config, meta.total_episodes)
    if episodes is not None:
        restrict_statistics(meta, episodes)
        logger.info("Actions supervise in %d of %d episodes: %s", len(episodes), meta.total_episodes, episodes)
        if "codes" not in config.objectives:
            logger.info("The others teach nothing in mode=actions; --dataset.episodes=<the same list> leaves them out.")
    return episodes
