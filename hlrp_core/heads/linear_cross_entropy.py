"""Cross entropy on the rows of a vocabulary projection, with one buffer for logits, probabilities and their gradient.

`F.cross_entropy(F.linear(hidden, weight), labels)` keeps three arrays of the size of the logits, and hands autograd a
gradient of the weights that tied embeddings cannot be added to in place. With a vocabulary of 150,000 rows these
dominate a training step of a small model. The value and the gradients are the same.

Shape legend: M labelled positions, W hidden width, V vocabulary rows, R replaced rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hlrp_core.backbones.cpu_linear import fast_linear


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, rows: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """Losses `[M]` float32 of hidden states `[M, W]` projected by `weight` `[V, W]`, against `labels` `[M]` long.

    Projects in the precision of autocast where that is on, else in that of the weights; the softmax is float32.

    Args:
        rows: `[R, W]`, in place of the rows of `weight` from `first_row` on. Where `weight` needs no gradient, none of
            its size is made.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if rows is None:
        rows = weight.new_empty(0, weight.shape[1])
    span = slice(first_row, first_row + len(rows))
    return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), rows.to(dtype), labels, span)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, span: slice) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = fast_linear(hidden, weight).float()  # (M, V)
            logits[:, span] = F.linear(hidden, rows).float()
        highest = logits.amax(dim=1, keepdim=True)
        at_label = logits.gather(1, labels[:, None])
        weights = logits.sub_(highest).exp_()  # of the softmax, not yet divided by their sum; the logits' memory
        total = weights.sum(dim=1, keepdim=True)
        ctx.save_for_backward(hidden, weight, rows, labels, total)
        ctx.span = span
        ctx.weights = weights
        return (total.log() + highest - at_label)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, rows, labels, total = ctx.saved_tensors
        if ctx.weights is None:
            raise RuntimeError("linear_cross_entropy: expected one backward, got a second; its buffer is used up.")
        of_logits = ctx.weights.mul_(grad[:, None] / total)  # (M, V), in place again
        ctx.weights = None
        of_logits.scatter_add_(1, labels[:, None], -grad[:, None])
        of_logits = of_logits.to(weight.dtype)
        at_rows = of_logits[:, ctx.span].clone()  # (M, R)
        of_logits[:, ctx.span] = 0
        needs_hidden, needs_weight, needs_rows, *_ = ctx.needs_input_grad
        of_hidden = fast_linear(of_logits, weight.t()) + at_rows @ rows if needs_hidden else None
        of_weight = of_logits.t() @ hidden if needs_weight else None
        of_rows = at_rows.t() @ hidden if needs_rows else None
        return of_hidden, of_weight, of_rows, None, None
