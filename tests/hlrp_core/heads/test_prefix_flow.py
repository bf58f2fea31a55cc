"""The flow head that attends to the backbone's prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import PrefixEncoding


def predict(head, context) -> torch.Tensor:
    noise = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(4))
    return head.predict(context, SamplingOptions(noise=noise))


@pytest.mark.parametrize("filler", [0.0, 1e4, float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, filler, build, make_context, actions, fixed_loss) -> None:
    head, context = build("prefix_flow"), make_context()
    pad = (3, 0) if side == "left" else (0, 3)
    padded = PrefixEncoding(
        F.pad(context.prefix.hidden, (0, 0, *pad)).masked_fill(
            ~F.pad(context.prefix.valid_mask, pad)[..., None], filler
        ),
        F.pad(context.prefix.valid_mask, pad),
    )
    longer = replace(context, prefix=padded)
    torch.testing.assert_close(predict(head, longer), predict(head, context), atol=1e-6, rtol=1e-5)
    loss, loss_longer = (fixed_loss(head, c, actions, None) for c in (context, longer))
    torch.testing.assert_close(loss_longer, loss, atol=1e-6, rtol=1e-5)
    loss_longer.mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters() if parameter.grad is not None)


def test_gradient_reaches_the_prefix_from_the_first_step(build, make_context, actions) -> None:
    head, context = build("prefix_flow", is_fresh=True).train(), make_context()
    context.prefix.hidden.requires_grad_()
    head.per_sample_loss(context, actions, None).mean().backward()
    gradient = context.prefix.hidden.grad
    assert (gradient[context.prefix.valid_mask].norm(dim=-1) > 0).all()
    assert (gradient[~context.prefix.valid_mask] == 0).all()


def test_scale_of_the_prefix_does_not_matter(build, make_context) -> None:
    head, context = build("prefix_flow"), make_context()
    scaled = replace(context, prefix=replace(context.prefix, hidden=context.prefix.hidden * 300))
    torch.testing.assert_close(predict(head, scaled), predict(head, context), atol=1e-5, rtol=1e-4)


def test_prefix_of_another_precision(build, make_context) -> None:
    head, context = build("prefix_flow"), make_context()
    low = replace(context, prefix=replace(context.prefix, hidden=context.prefix.hidden.bfloat16()))
    torch.testing.assert_close(predict(head, low), predict(head, context), atol=0.02, rtol=0.02)


def test_codes_are_optional(build, make_context) -> None:
    head, context = build("prefix_flow", code_conditioning="none"), make_context()
    assert not head.needs_codes
    assert torch.equal(predict(head, context), predict(head, replace(context, code_probs=None)))


def test_order_of_the_codes_matters(build, make_context) -> None:
    head, context = build("prefix_flow"), make_context()
    turned = replace(context, code_probs=context.code_probs.flip(1))
    assert not torch.allclose(predict(head, context), predict(head, turned), atol=1e-4)
