"""The time convention, the training times and the solver."""

from __future__ import annotations

import pytest
import torch

from hlrp_core.heads.flow_matching import integrate, interpolate, sample_times, solver_times


def test_one_is_noise_and_zero_is_data() -> None:
    actions, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    x_t, velocity = interpolate(actions, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(velocity, noise - actions)
    torch.testing.assert_close(x_t[0], actions[0])
    torch.testing.assert_close(x_t[1], noise[1])
    torch.testing.assert_close(x_t[2], 0.25 * noise[2] + 0.75 * actions[2])


def test_path_is_float32() -> None:
    x_t, velocity = interpolate(torch.randn(1, 2, 2).bfloat16(), torch.randn(1, 2, 2).bfloat16(), torch.rand(1))
    assert x_t.dtype == velocity.dtype == torch.float32


@pytest.mark.parametrize(("distribution", "power"), [("beta", 1.5), ("uniform", 1.0)])
def test_training_times(distribution, power) -> None:
    torch.manual_seed(0)
    times = sample_times(20_000, distribution=distribution, device=torch.device("cpu"))
    assert times.dtype == torch.float32
    assert 0.001 <= times.min() < 0.03
    assert 0.99 < times.max() <= 1
    for t in (0.2, 0.5, 0.8):  # the distribution function of Beta(power, 1) is t^power
        assert (times < t).float().mean().item() == pytest.approx(t**power, abs=0.015)


def test_solver_follows_a_straight_path_exactly() -> None:
    actions, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    for num_steps in (1, 3, 10):
        torch.testing.assert_close(integrate(lambda x, step: noise - actions, noise, num_steps), actions)


def test_solver_asks_at_the_start_of_each_step() -> None:
    assert solver_times(4) == [1.0, 0.75, 0.5, 0.25]
    seen: list[tuple[int, float]] = []

    def velocity(x_t: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((step, x_t.item()))
        return torch.ones_like(x_t)

    assert integrate(velocity, torch.ones(1, 1, 1), 4).item() == 0.0
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]


def test_guide_replaces_the_velocity() -> None:
    seen: list[float] = []

    def guide(x_t, time, denoise):
        seen.append(time)
        return denoise(x_t) * 2

    assert integrate(lambda x, step: torch.ones_like(x), torch.ones(1, 1, 1), 4, guide).item() == -1.0
    assert seen == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("is_differentiating", [False, True])
def test_network_records_a_gradient_only_where_the_guide_asks(is_differentiating) -> None:
    weight = torch.ones((), requires_grad=True)
    recorded: list[bool] = []

    def guide(x_t, time, denoise):
        with torch.enable_grad():
            v_t = denoise(x_t.detach().requires_grad_(is_differentiating))
        recorded.append(v_t.requires_grad)
        return v_t.detach()

    with torch.no_grad():
        integrate(lambda x, step: x * weight, torch.ones(1, 1, 1), 2, guide)
    assert recorded == [is_differentiating] * 2
