"""LeRobot's batch dictionaries and the contract's types.

A LeRobot batch, as the preprocessor hands it over (keys that a policy reads):

    observation.images.<camera>         [B, 3, H, W] or [B, T, 3, H, W] float in [0, 1]; frame t first
    observation.images.<camera>_is_pad  [B, T] bool: frames past the end of the episode
    observation.state                   [B, D] or [B, T, D] float, normalised
    action                              [B, C, A] float, normalised; None or absent without labels
    action_is_pad                       [B, C] bool
    task                                B strings
    index, episode_index                [B] long: global frame, episode

Shape legend: B batch, T frames in time, H W image size, D state width, C chunk length, A action width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from hlrp_core.contract import ActionBatch

if TYPE_CHECKING:
    from lerobot_hlrp.label_sources import LabelSource
    from lerobot_hlrp.policy_config import HLRPConfig

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class ActionSizes:
    """Of the actions of another dataset: C, A, and D of the state beside them (0 for none)."""

    chunk_size: int
    action_dim: int
    state_dim: int


class BatchReader:
    """Reads LeRobot batches for one policy.

    Args:
        config: with its features settled.
        state_dim: width of the state that the action head or the prompt sees; 0 where none does.
        labels: where codes come from; None where there are none.
        action_episodes: those that may supervise actions; None for all.
        without_actions: for video in a mix that learns actions from other datasets: every sample has actions and a
            state of these sizes, which supervise nothing.
    """

    def __init__(
        self,
        config: HLRPConfig,
        *,
        state_dim: int,
        labels: LabelSource | None = None,
        action_episodes: Sequence[int] | None = None,
        without_actions: ActionSizes | None = None,
    ):
        self.config = config
        self.state_dim = state_dim
        self.labels = labels
        self.action_episodes = None if action_episodes is None else torch.tensor(action_episodes)
        self.without_actions = without_actions
        self._action_dim = None if config.action_feature is None else config.action_feature.shape[0]

    def read_observation(self, batch: Batch) -> ActionBatch:
        """What a prediction is made from.

        Raises:
            ValueError: the batch lacks something, or holds it in another form.
        """
        frames = self._read_frames(batch)
        return self._build(batch, frames, state=self._read_state(batch, None))

    def read_training(self, batch: Batch, *, is_held_out: bool = False) -> ActionBatch:
        """Observation and labels to learn from. Frames after t go to the teacher and no further.

        Args:
            is_held_out: the labels only measure, so that every episode that has actions counts.

        Raises:
            ValueError: the batch lacks something, or holds it in another form.
        """
        frames = self._read_frames(batch)
        labels: dict[str, Any] = {}
        valid = None
        if self.config.needs_code_labels:
            labels["target_codes"], labels["codes_valid"] = self._read_codes(batch, frames)
        if self.config.learns_actions:
            valid = self._read_action_valid(batch, is_held_out)
            labels["actions"], labels["action_is_pad"] = read_actions(
                batch, chunk_size=self.config.chunk_size, action_dim=self._action_dim, action_valid=valid
            )
            everyone = torch.ones(len(frames), dtype=torch.bool, device=frames.device)
            labels["action_valid"] = everyone if valid is None else valid
        if self.config.reads_state:
            # a prompt shows the state of every sample, labelled or not
            labels["state"] = self._read_state(batch, None if self.config.prompt.state_text else valid)
        if self.without_actions is not None:
            labels = {**_no_actions(self.without_actions, len(frames), frames.device), **labels}
        return self._build(batch, frames, **labels)

    def _build(self, batch: Batch, frames: Tensor, **rest: Any) -> ActionBatch:
        size = (frames.shape[2], frames.shape[3])
        views = {name: resize_view(read_frames(batch, name)[:, 0], size) for name in self.config.extra_cameras}
        instructions = read_instructions(batch, len(frames))
        return ActionBatch(frames=frames[:, :1], instructions=instructions, views=views, **rest)

    def _read_frames(self, batch: Batch) -> Tensor:
        assert self.config.camera is not None  # settled by validate_features
        return read_frames(batch, self.config.camera)

    def _read_codes(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        if self.labels is None:
            raise missing_labels(self.config)
        return self.labels.label(batch, frames)

    def _read_action_valid(self, batch: Batch, is_held_out: bool) -> Tensor | None:
        if self.action_episodes is None:
            return None
        if is_held_out and batch.get(ACTION) is not None:
            is_known = batch[ACTION].isfinite()
            is_known = is_known.all(-1) if is_known.ndim == 3 else is_known  # (B, C)
            is_pad = batch.get("action_is_pad")
            return (is_known if is_pad is None else is_known | is_pad).all(1)
        episodes = batch["episode_index"].flatten()
        return torch.isin(episodes, self.action_episodes.to(episodes.device))

    def _read_state(self, batch: Batch, action_valid: Tensor | None) -> Tensor | None:
        if self.state_dim == 0:
            return None
        state = select_rows(read_state(batch, self.state_dim, size=len(batch[self.config.camera])), action_valid)
        check_finite(state.isfinite(), OBS_STATE, batch)
        return state


def _no_actions(sizes: ActionSizes, num_samples: int, device: torch.device) -> dict[str, Tensor]:
    actions = torch.zeros(num_samples, sizes.chunk_size, sizes.action_dim, device=device)
    found = {"actions": actions, "action_is_pad": torch.ones(actions.shape[:2], dtype=torch.bool, device=device)}
    found["action_valid"] = torch.zeros(num_samples, dtype=torch.bool, device=device)
    if sizes.state_dim:
        found["state"] = torch.zeros(num_samples, sizes.state_dim, device=device)
    return found


def missing_labels(config: HLRPConfig) -> ValueError:
    return ValueError(
        f"labels for mode={config.mode}: expected a source of codes, got none. Next step: set --policy.codes to a code "
        "table of the dataset, or --policy.laq to a LAQ."
    )


def to_frames(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` or `[B, T, 3, H, W]`, float in [0, 1] or uint8 -> the very pixels, `[B, T, H, W, 3]` uint8.

    Raises:
        ValueError: another shape, or values outside [0, 1], which are no image.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(
            f"images: expected [B, 3, H, W] or [B, T, 3, H, W], got {list(images.shape)}. Next step: pass the batch "
            "through the policy's preprocessor."
        )
    if images.dtype != torch.uint8:
        low, high = (bound.item() for bound in images.aminmax())
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(
                f"images: expected values in [0, 1], got {low:.3g} to {high:.3g}. Next step: leave the normalisation "
                "of VISUAL at IDENTITY; the backbone's processor normalises images itself."
            )
        images = (images.float() * 255).round().to(torch.uint8)
    return (images if images.ndim == 5 else images[:, None]).movedim(-3, -1)


def resize_view(view: Tensor, size: tuple[int, int]) -> Tensor:
    """A further camera `[B, h, w, 3]` uint8 at the size of the LAQ's, `[B, H, W, 3]`.

    A prompt's images are of one size, and a robot's cameras often are not.
    """
    if tuple(view.shape[1:3]) == size:
        return view
    images = F.interpolate(view.movedim(-1, 1).float(), size, mode="bilinear", antialias=True)  # (B, 3, H, W)
    return images.round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


def read_frames(batch: Batch, camera: str) -> Tensor:
    """Frames `[B, T, H, W, 3]` uint8 of one camera.

    Raises:
        ValueError: the batch lacks the camera.
    """
    if batch.get(camera) is None:
        cameras = [key for key in batch if key.startswith("observation.image") and not key.endswith("_is_pad")]
        raise ValueError(
            f"camera: expected {camera} in the batch, got {', '.join(cameras) or 'no camera'}. Next step: set "
            "--policy.camera, or rename the cameras with --rename_map."
        )
    return to_frames(batch[camera])


def read_instructions(batch: Batch, size: int) -> list[str]:
    """B instructions; an empty one is an instruction like any other, a missing one is not.

    Raises:
        ValueError: no `task`, or not one for each sample.
    """
    task = batch.get("task")
    if isinstance(task, str):
        task = [task]
    if task is None or len(task) != size:
        raise ValueError(
            f"task: expected {size} instruction(s) as a list of strings, got {'none' if task is None else len(task)}. "
            "Next step: put 'task' into the batch; '' where there are no words."
        )
    return list(task)


def read_state(batch: Batch, state_dim: int, *, size: int) -> Tensor:
    """The state at time t, `[B, D]`.

    Args:
        state_dim: D.
        size: B.

    Raises:
        ValueError: no state, or one of another width.
    """
    state = batch.get(OBS_STATE)
    if state is not None and state_dim == 1 and state.ndim < 3:
        state = _as_vectors(state, size)
    if state is None or state.shape[-1] != state_dim:
        raise ValueError(
            f"{OBS_STATE}: expected [B, {state_dim}], got {None if state is None else list(state.shape)}. Next step: "
            "use the dataset or environment that the policy was made for."
        )
    return state[:, 0] if state.ndim == 3 else state


def _as_vectors(state: Tensor, size: int) -> Tensor:
    """LeRobot stores a vector of one number as the number, and takes a batch `[B]` of them for one vector, `[1, B]`.

    Args:
        state: `[B]`, `[1, B]`, `[B, 1]` or, with T frames in time, `[B, T]`.
        size: B.

    Returns:
        `[B, 1]`, at time t.
    """
    if state.ndim == 2 and state.shape[0] == size:
        return state[:, :1]
    return state.reshape(-1, 1)


def read_actions(
    batch: Batch, *, chunk_size: int, action_dim: int | None, action_valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Action labels `[B, C, A]` and their padding `[B, C]`.

    Raises:
        ValueError: no actions, no chunk, or NaN where they would supervise.
    """
    actions = batch.get(ACTION)
    if actions is None:
        raise ValueError(
            "action: expected labels [B, C, A], got none. Next step: use a dataset with actions, or "
            "--policy.mode=codes."
        )
    if actions.ndim == 2 and action_dim == 1:
        actions = actions.unsqueeze(-1)  # as in `read_state`
    if actions.ndim != 3 or actions.shape[1] != chunk_size:
        raise ValueError(
            f"action: expected chunks [B, {chunk_size}, A], got {list(actions.shape)}. Next step: build the dataset "
            "with the policy's action_delta_indices, as lerobot-train does."
        )
    is_pad = batch.get("action_is_pad")
    broken = ~actions.isfinite().all(-1)  # (B, C)
    if is_pad is not None:
        broken = broken & ~is_pad
    if action_valid is not None:
        broken = broken & action_valid[:, None]
    check_finite(~broken, ACTION, batch)
    return actions, is_pad


def check_finite(is_fine: Tensor, name: str, batch: Batch) -> None:
    """Raises:
    ValueError: `is_fine` `[B, ...]` is False somewhere; the samples are named.
    """
    if bool(is_fine.all()):
        return
    rows = (~is_fine.flatten(1).all(1)).nonzero().flatten().tolist()
    where = f"samples {rows}"
    if isinstance(batch.get("index"), Tensor):
        where = f"frames {batch['index'].flatten()[rows].tolist()} of the dataset"
    raise ValueError(
        f"{name}: expected finite numbers, got NaN or infinity in {where}. Next step: repair the dataset, or let only "
        "episodes with sound labels supervise (--policy.action_episodes)."
    )


def select_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` `[B, ...]` with zeros where `mask` `[B]` is False: fillers there may be NaN, and 0 * NaN is NaN."""
    if mask is None:
        return values
    return torch.where(mask.view(-1, *[1] * (values.ndim - 1)), values, torch.zeros_like(values))
