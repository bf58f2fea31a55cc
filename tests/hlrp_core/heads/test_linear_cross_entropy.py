from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.heads.linear_cross_entropy import linear_cross_entropy, workspace

M, W, V = 12, 16, 50


def inputs(dtype=torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = (scale * torch.randn(M, W)).to(dtype).requires_grad_()
    weight = torch.randn(V, W).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (M,))


def both(hidden, weight, labels, upstream):
    """Losses and gradients: ours and the plain computation's."""
    results = []
    for loss in (
        linear_cross_entropy(hidden, weight, labels),
        F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none"),
    ):
        grads = torch.autograd.grad((loss * upstream).sum(), (hidden, weight))
        results.append((loss.detach(), *grads))
    return results


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_value_and_gradients(scale):
    ours, theirs = both(*inputs(scale=scale), torch.randn(M))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_labels_that_count_nothing_get_no_gradient():
    hidden, weight, labels = inputs()
    upstream = torch.tensor([1.0, 0.0] * (M // 2))
    linear_cross_entropy(hidden, weight, labels).mul(upstream).sum().backward()
    assert not hidden.grad[1::2].any()
    assert hidden.grad[::2].abs().sum(1).min() > 0


def test_bfloat16_weights():
    ours, theirs = both(*inputs(torch.bfloat16), torch.ones(M))
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == torch.bfloat16
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)


def test_autocast():
    hidden, weight, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(hidden, weight, labels, torch.ones(M))
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


def test_what_needs_no_gradient_gets_none():
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight.detach(), labels).sum().backward()
    assert hidden.grad is not None
    linear_cross_entropy(hidden.detach(), weight, labels).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"expected one backward, got a second.*Next step: compute the loss anew"):
        loss.backward()


def test_the_inputs_are_left_as_they_were():
    hidden, weight, labels = inputs()
    before = hidden.detach().clone(), weight.detach().clone(), labels.clone()
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, labels), before, strict=True))


@pytest.mark.parametrize("first_row", [0, 3])
def test_replaced_rows_equal_a_table_that_holds_them(first_row):
    hidden, weight, labels = inputs()
    rows = torch.randn(4, weight.shape[1], requires_grad=True)
    labels[:2] = first_row  # some of the labels are among them
    upstream = torch.randn(M)
    frozen = weight.detach()
    ours = linear_cross_entropy(hidden, frozen, labels, rows=rows, first_row=first_row)
    table = torch.cat([weight[:first_row], rows, weight[first_row + 4 :]])
    theirs = F.cross_entropy(F.linear(hidden, table), labels, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, reference in zip(
        torch.autograd.grad((ours * upstream).sum(), (hidden, rows)),
        torch.autograd.grad((theirs * upstream).sum(), (hidden, rows)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_share_memory_and_nothing_else(dtype):
    """The buffer of logits is used again, but by nobody while a backward still needs it."""
    hidden, weight, labels = inputs(dtype)
    others = torch.randn(3, M, W).to(dtype)
    expected = [torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).sum(), (hidden, weight))]
    expected += [torch.autograd.grad(linear_cross_entropy(x, weight, labels).sum(), weight) for x in others]
    workspace.clear()
    losses = [linear_cross_entropy(x, weight, labels).sum() for x in (hidden, *others)]  # all before any backward
    with torch.no_grad():
        linear_cross_entropy(others[0], weight, labels)
        linear_cross_entropy(others[0][:3], weight, labels[:3])  # a smaller one
    found = [torch.autograd.grad(losses[0], (hidden, weight))]
    linear_cross_entropy(others[1], weight, labels)  # never gets a backward
    found += [torch.autograd.grad(loss, weight) for loss in losses[1:]]
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_memory_of_logits_is_used_again():
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    kept = workspace.take(M, V)
    address = kept.data_ptr()
    workspace.keep(kept)
    linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert workspace.take(M, V).data_ptr() == address
    workspace.keep(kept)
    assert workspace.take(2 * M, V).shape == (2 * M, V)  # what is too small is let go
    workspace.keep(torch.empty(20 * M * V))
    assert workspace.take(M, V).untyped_storage().nbytes() < 20 * M * V * 4  # and what is far too large


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_under_inference_mode_leaves_nothing_that_breaks_training(dtype):
    hidden, weight, labels = inputs(dtype)
    workspace.clear()
    expected = linear_cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(expected.sum(), (hidden, weight))
    for before in (workspace.clear, lambda: None):  # it makes the buffer, and it finds one
        before()
        with torch.inference_mode():
            assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)
            assert torch.equal(linear_cross_entropy(hidden.detach(), weight.detach(), labels), expected)
        loss = linear_cross_entropy(hidden, weight, labels)
        assert torch.equal(loss, expected)
        again = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_memory_is_used_again_at_once(mode):
    """Parameters need a gradient there, too; none will be asked for."""
    hidden, weight, labels = inputs()
    workspace.clear()
    with mode():
        linear_cross_entropy(hidden, weight, labels)
        kept = workspace.take(M, V)
        address = kept.data_ptr()
        workspace.keep(kept)
        linear_cross_entropy(hidden, weight, labels)
    taken = workspace.take(M, V)
    assert taken.data_ptr() == address
    assert not taken.is_inference()
