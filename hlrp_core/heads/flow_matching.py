"""Flow matching: training times and targets, and the Euler solver from noise to actions.

The one time convention of the project: **t = 1 is noise, t = 0 is data**, on the straight path
`x_t = t * noise + (1 - t) * data`, whose velocity is `v = noise - data`. Sampling therefore integrates from
t = 1 down to t = 0, and at any point `x_t - t * v` is the current guess of the data. openpi and LeRobot use
the same one, and LeRobot's real-time chunking depends on it.

Times, paths and integration are float32 whatever the dtype of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

TimeSampling = Literal["beta", "uniform"]

_BETA_ALPHA = 1.5
# The path is at rest at t = 0 exactly, so there is nothing to learn there (openpi's offset).
_MIN_TIME = 0.001


class Guidance(Protocol):
    """Replaces the velocity of one solver step by one that is steered towards the chunk before.

    The signature is that of `denoise_step` of LeRobot's `RTCProcessor`, so that the bound method can be
    passed as it is. It is called with keywords, outside inference mode and under `no_grad`; an implementation
    that needs the gradient enables it. See "Real-Time Execution of Action Chunking Flow Policies" (2025).
    """

    def __call__(
        self,
        x_t: Tensor,
        prev_chunk_left_over: Tensor | None,
        inference_delay: int,
        time: float,
        original_denoise_step_partial: Callable[[Tensor], Tensor],
        execution_horizon: int | None = None,
    ) -> Tensor: ...


def sample_times(num_times: int, *, distribution: TimeSampling, device: torch.device) -> Tensor:
    """`[num_times]` float32 in [0.001, 1], from torch's global generator."""
    uniform = torch.rand(num_times, device=device, dtype=torch.float32)
    if distribution == "beta":
        uniform = uniform ** (1.0 / _BETA_ALPHA)  # Beta(a, 1) has the distribution function t^a
    return _MIN_TIME + (1.0 - _MIN_TIME) * uniform


def interpolate(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The point `x_t` on the path at `time` `[B]`, and the velocity there: both `[B, C, A]` float32."""
    actions, noise = actions.float(), noise.float()
    velocity = noise - actions
    return actions + time.float()[:, None, None] * velocity, velocity


def solver_times(num_steps: int) -> list[float]:
    """Where each Euler step starts: 1, 1 - 1/n, ..., 1/n."""
    return [1.0 - step / num_steps for step in range(num_steps)]


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    num_steps: int,
    guide: Callable[[Tensor, float, Callable[[Tensor], Tensor]], Tensor] | None = None,
) -> Tensor:
    """Euler steps from `noise` at t = 1 to actions at t = 0.

    Args:
        velocity: of `x_t` `[B, C, A]` in the step of that number, which starts at `solver_times(...)[step]`.
        noise: `[B, C, A]` float32.
        num_steps: of equal length.
        guide: takes `x_t`, its time and the velocity as a function of `x_t` alone; returns the one to follow.
    """
    x_t = noise
    for step, time in enumerate(solver_times(num_steps)):

        def denoise(x: Tensor, step: int = step) -> Tensor:
            # A guide enables the gradient for its own arithmetic. The network records one only where the
            # guide differentiates through it; otherwise a graph over all parameters would be built in vain.
            with torch.set_grad_enabled(x.requires_grad):
                return velocity(x, step)

        v_t = denoise(x_t) if guide is None else guide(x_t, time, denoise)
        x_t = x_t - v_t / num_steps
    return x_t
