"""Flow heads: prediction equals its slow twin, chance is under control, guidance is checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads.flow_matching import integrate, solver_times

flow_heads = pytest.mark.parametrize("kind", ["flow", "prefix_flow"])


def predict_slowly(head, context, noise):
    """Every step encodes the whole context again."""
    times = solver_times(head.config.num_flow_steps)
    return integrate(
        lambda x_t, step: head.velocity(context, x_t, torch.full((len(x_t),), times[step])),
        noise,
        head.config.num_flow_steps,
    )


@flow_heads
@pytest.mark.parametrize("num_flow_steps", [1, 7])
def test_prediction_equals_encoding_in_every_step(kind, num_flow_steps, build, make_context) -> None:
    head, context = build(kind, num_flow_steps=num_flow_steps), make_context()
    noise = torch.randn(5, 8, 2)
    with torch.no_grad():
        fast = head.predict(context, SamplingOptions(noise=noise))
        torch.testing.assert_close(fast, predict_slowly(head, context, noise), atol=1e-6, rtol=1e-5)


@flow_heads
def test_context_is_encoded_once(kind, build, make_context, monkeypatch) -> None:
    head = build(kind)
    calls = []
    for name in ("remember", "modulation"):
        original = getattr(head.expert, name)
        monkeypatch.setattr(head.expert, name, lambda *args, f=original, n=name: calls.append(n) or f(*args))
    head.predict(make_context(), SamplingOptions())
    assert sorted(calls) == ["modulation", "remember"]


@flow_heads
def test_loss_is_the_error_of_the_velocity(kind, build, make_context, actions) -> None:
    head, context = build(kind), make_context()
    noise, time = torch.randn(5, 8, 2), torch.rand(5)
    x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    expected = (head.velocity(context, x_t, time) - (noise - actions)).square().mean(dim=(1, 2))
    torch.testing.assert_close(head.per_sample_loss(context, actions, None, noise=noise, time=time), expected)


@flow_heads
def test_no_step_attends_to_a_padded_one(kind, build, make_context, actions, is_pad) -> None:
    head, context = build(kind), make_context()
    noise, time = torch.randn(5, 8, 2), torch.rand(5)
    loss = head.per_sample_loss(context, actions, is_pad, noise=noise, time=time)
    other = torch.where(is_pad[..., None], torch.randn(5, 8, 2), noise)
    assert torch.equal(head.per_sample_loss(context, actions, is_pad, noise=other, time=time), loss)


@flow_heads
def test_generator_decides_the_noise(kind, build, make_context) -> None:
    head, context = build(kind), make_context()

    def predict(seed: int) -> torch.Tensor:
        return head.predict(context, SamplingOptions(generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(predict(0), predict(0))
    assert not torch.equal(predict(0), predict(1))
    noise = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predict(0), head.predict(context, SamplingOptions(noise=noise)))


@flow_heads
def test_training_draws_follow_the_global_seed(kind, build, make_context, actions) -> None:
    head, context = build(kind, num_noise_draws=3), make_context()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return head.per_sample_loss(context, actions, None)

    assert loss().shape == (5,)
    assert torch.equal(loss(), loss())
    assert not torch.equal(loss(), head.per_sample_loss(context, actions, None))


@flow_heads
def test_several_draws_average_single_ones(kind, build, make_context, actions, is_pad) -> None:
    single, several = build(kind), build(kind, num_noise_draws=200)
    several.load_state_dict(single.state_dict())
    context = make_context()
    with torch.no_grad():
        draws = torch.stack([single.per_sample_loss(context, actions, is_pad) for _ in range(200)])
        averaged = several.per_sample_loss(context, actions, is_pad)
    tolerance = 5 * (2 / 200) ** 0.5 * draws.std(dim=0) + 1e-6
    assert ((draws.mean(dim=0) - averaged).abs() < tolerance).all()


@flow_heads
def test_noise_of_another_shape(kind, build, make_context) -> None:
    with pytest.raises(ValueError, match=r"noise: expected shape \[5, 8, 2\], got \[5, 8, 3\]"):
        build(kind).predict(make_context(), SamplingOptions(noise=torch.zeros(5, 8, 3)))


# -- guidance --------------------------------------------------------------------------------------------------------


@flow_heads
def test_guidance_gets_the_chunk_and_each_step(kind, build, make_context) -> None:
    head, context, left_over = build(kind), make_context(), torch.randn(5, 3, 2)
    calls = []

    def guidance(**arguments):
        calls.append(arguments)
        return arguments["original_denoise_step_partial"](arguments["x_t"])

    noise = torch.randn(5, 8, 2)
    options = SamplingOptions(noise=noise, inference_delay=2, prev_chunk_left_over=left_over, execution_horizon=3)
    guided = head.predict(context, replace(options, guidance=guidance))
    assert torch.equal(guided, head.predict(context, SamplingOptions(noise=noise)))
    assert [call["time"] for call in calls] == [1.0, 0.75, 0.5, 0.25]
    assert torch.equal(calls[0]["x_t"], noise)
    for call in calls:
        assert torch.equal(call["prev_chunk_left_over"], left_over)
        assert (call["inference_delay"], call["execution_horizon"]) == (2, 3)


@flow_heads
def test_guidance_rests_without_a_chunk(kind, build, make_context) -> None:
    def guidance(**_):
        raise AssertionError("called")

    build(kind).predict(make_context(), SamplingOptions(inference_delay=2, guidance=guidance))


@flow_heads
def test_guidance_arguments_are_checked(kind, build, make_context) -> None:
    head, context = build(kind), make_context()
    options = SamplingOptions(inference_delay=1, prev_chunk_left_over=torch.zeros(5, 3, 2))

    def guidance(**_):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="expected a guidance to follow it, got None"):
        head.predict(context, options)
    for shape in ((3, 2), (5, 9, 2), (5, 3, 1), (1, 3, 2)):
        wrong = replace(options, prev_chunk_left_over=torch.zeros(shape))
        with pytest.raises(ValueError, match=r"prev_chunk_left_over: expected .*got \["):
            head.predict(context, replace(wrong, guidance=guidance))
    for delay in (None, -1):
        with pytest.raises(ValueError, match=f"inference_delay: expected 0 or more .*got {delay}"):
            head.predict(context, replace(options, inference_delay=delay, guidance=guidance))
