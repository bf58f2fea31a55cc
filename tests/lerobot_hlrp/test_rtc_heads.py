"""LeRobot's own real-time chunking on the flow heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lerobot.policies.common.flow_matching import euler_integrate
from lerobot.policies.rtc import RTCConfig, RTCProcessor

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import ActionContext, ActionHeadConfig, PrefixEncoding, build_action_head

DELAY, HORIZON = 2, 5


@pytest.fixture(params=["flow", "prefix_flow"])
def head(request):
    torch.manual_seed(0)
    settings = {"hidden_dim": 32, "num_layers": 2, "time_dim": 16, "code_conditioning": "soft"}
    config = ActionHeadConfig(kind=request.param, state_dim=3, **settings)
    head = build_action_head(config, prefix_dim=12, codebook_size=6, code_seq_len=3).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head


@pytest.fixture
def context() -> ActionContext:
    prefix = PrefixEncoding(torch.randn(2, 7, 12), torch.ones(2, 7, dtype=torch.bool))
    return ActionContext(torch.randn(2, 3), torch.rand(2, 3, 6), prefix)


@pytest.fixture
def options() -> SamplingOptions:
    left_over = torch.full((2, 6, 2), 0.7)
    return SamplingOptions(
        noise=torch.randn(2, 8, 2),
        inference_delay=DELAY,
        prev_chunk_left_over=left_over,
        execution_horizon=HORIZON,
    )


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_equals_lerobots_own_loop(guard, head, context, options) -> None:
    processor = RTCProcessor(RTCConfig())
    with torch.no_grad():
        expected = euler_integrate(
            lambda x_t, time: head.velocity(context, x_t, time),
            options.noise,
            head.config.num_flow_steps,
            rtc_processor=processor,
            rtc_enabled=True,
            inference_delay=DELAY,
            prev_chunk_left_over=options.prev_chunk_left_over,
            execution_horizon=HORIZON,
        )
    with guard():
        actions = head.predict(context, replace(options, guidance=processor.denoise_step))
    assert actions.dtype == torch.float32
    assert not actions.requires_grad
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=1e-5)


def test_context_from_inference_mode(head, options) -> None:
    """A backbone that ran under inference mode hands over tensors that no gradient may go through."""
    with torch.inference_mode():
        prefix = PrefixEncoding(torch.randn(2, 7, 12), torch.ones(2, 7, dtype=torch.bool))
        context = ActionContext(torch.randn(2, 3), torch.rand(2, 3, 6), prefix)
        options = replace(options, noise=torch.randn(2, 8, 2), prev_chunk_left_over=torch.randn(2, 6, 2))
        head.predict(context, replace(options, guidance=RTCProcessor(RTCConfig()).denoise_step))


def test_guided_chunk_follows_the_old_one_where_it_must(head, context, options) -> None:
    """Frozen for the inference delay, free after the horizon."""
    free = head.predict(context, SamplingOptions(noise=options.noise))
    guided = head.predict(context, replace(options, guidance=RTCProcessor(RTCConfig()).denoise_step))
    left_over = options.prev_chunk_left_over
    error_free, error_guided = ((actions[:, :DELAY] - left_over[:, :DELAY]).abs().mean() for actions in (free, guided))
    assert error_guided < 0.2 * error_free
    change = (guided - free).abs().mean(dim=(0, 2))
    assert change[:DELAY].mean() > change[DELAY:HORIZON].mean() > change[HORIZON:].mean()


def test_a_short_old_chunk_and_the_first_one(head, context, options) -> None:
    processor = RTCProcessor(RTCConfig())
    free = head.predict(context, SamplingOptions(noise=options.noise))
    first = SamplingOptions(noise=options.noise, inference_delay=0, execution_horizon=HORIZON)
    assert torch.equal(head.predict(context, replace(first, guidance=processor.denoise_step)), free)
    short = SamplingOptions(
        noise=options.noise, inference_delay=DELAY, prev_chunk_left_over=options.prev_chunk_left_over[:, :1]
    )
    assert not torch.equal(head.predict(context, replace(short, guidance=processor.denoise_step)), free)


def test_a_processor_that_differentiates_through_the_network(head, context, options) -> None:
    """RTC as published takes the vector-Jacobian product of the network too."""

    def denoise_step(*, x_t, prev_chunk_left_over, time, original_denoise_step_partial, **_):
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            v_t = original_denoise_step_partial(x_t)
            clean = x_t - time * v_t
            error = (prev_chunk_left_over - clean[:, : prev_chunk_left_over.shape[1]]).detach()
            correction = torch.autograd.grad(clean[:, : prev_chunk_left_over.shape[1]], x_t, error)[0]
        assert correction[:, -1].abs().max() > 0  # steps beyond the old chunk hear of it through the network
        return v_t.detach() - correction

    with torch.inference_mode():
        actions = head.predict(context, replace(options, guidance=denoise_step))
    assert actions.isfinite().all()
    assert all(parameter.grad is None for parameter in head.parameters())
