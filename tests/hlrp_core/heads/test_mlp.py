"""The regression head."""

from __future__ import annotations

import pytest
import torch

from hlrp_core.contract import SamplingOptions


def test_has_one_answer(build, make_context) -> None:
    head, context = build("mlp"), make_context()
    noise = SamplingOptions(noise=torch.randn(5, 8, 2))
    assert torch.equal(head.predict(context, SamplingOptions()), head.predict(context, noise))


def test_loss_is_the_mean_absolute_error(build, make_context, actions) -> None:
    head, context = build("mlp"), make_context()
    expected = (head(context) - actions).abs().mean(dim=(1, 2))
    torch.testing.assert_close(head.per_sample_loss(context, actions, None), expected)


def test_order_of_the_codes_matters(build, make_context) -> None:
    head, context = build("mlp"), make_context()
    turned = make_context()
    turned.code_probs.copy_(context.code_probs.flip(1))
    assert not torch.allclose(head(context), head(turned), atol=1e-4)


def test_cannot_be_guided(build, make_context) -> None:
    head = build("mlp")
    assert not head.supports_guidance
    options = SamplingOptions(inference_delay=1, prev_chunk_left_over=torch.zeros(5, 3, 2))
    with pytest.raises(ValueError, match=r"a regression has no steps to guide.*Next step"):
        head.predict(make_context(), options)
