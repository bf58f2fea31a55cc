"""One recorded episode, and how an expert plays it.

T steps; images are what `lerobot-eval` shows a policy, H x W x 3, uint8; D state and A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class ExpertEnv(Protocol):
    """A gymnasium environment with LeRobot's observation keys that also knows its expert's next action."""

    task_description: str

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]: ...

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]: ...

    def expert_action(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Episode:
    """images (T, H, W, 3) uint8, states (T, D) float32, actions (T, A) float32; frame t is what the expert saw when it
    chose action t. The observation after the last action is not part of it, as in every LeRobotDataset."""

    task: str
    images: list[np.ndarray]
    states: np.ndarray
    actions: np.ndarray
    is_success: bool

    def __len__(self) -> int:
        return len(self.images)


class RecordingStopped(Exception):  # noqa: N818 (no error: somebody asked for it)
    """Recording was asked to stop in the middle of an episode, which is then not kept."""


def record_episode(env: ExpertEnv, seed: int, noise: float, should_stop: Callable[[], bool]) -> Episode:
    """Plays one episode.

    With `noise` the executed action is the expert's plus Gaussian noise of that standard deviation (in action units,
    clipped to the action's range), while the recorded one stays the expert's: the data then shows how to recover from
    small errors (DART, Laskey et al. 2017). The noise depends on `seed` alone.
    Raises ValueError for a state or action that is not finite, RecordingStopped when `should_stop` says so.
    """
    rng = np.random.default_rng([seed, 1])
    observation, _ = env.reset(seed=seed)
    task = env.task_description
    images, states, actions = [], [], []
    is_over, info = False, {}
    while not is_over:
        if should_stop():
            raise RecordingStopped
        action = np.clip(env.expert_action(), -1.0, 1.0).astype(np.float32)
        state = np.asarray(observation["agent_pos"], dtype=np.float32)
        _require_finite("state", state, seed, len(images))
        _require_finite("action", action, seed, len(images))
        images.append(observation["pixels"])
        states.append(state)
        actions.append(action)
        executed = action
        if noise > 0:
            executed = np.clip(action + rng.normal(0.0, noise, action.shape), -1.0, 1.0).astype(np.float32)
        observation, _, terminated, truncated, info = env.step(executed)
        is_over = terminated or truncated
    return Episode(task, images, np.stack(states), np.stack(actions), bool(info["is_success"]))


def _require_finite(name: str, values: np.ndarray, seed: int, step: int) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} at step {step} of the episode with seed {seed}: expected finite numbers, got {values.tolist()}. "
            "The environment or its expert is broken for this seed. Next step: Record with another --seed."
        )
