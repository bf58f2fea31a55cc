"""Cross entropy on the rows of a vocabulary projection, with one buffer for logits, probabilities and their gradient.

`F.cross_entropy(F.linear(hidden, weight), labels)` keeps three arrays of the size of the logits, and hands autograd a
gradient of the weights that tied embeddings cannot be added to in place. With a vocabulary of 150,000 rows these
dominate a training step of a small model. The value and the gradients are the same.

Shape legend: M labelled positions, W hidden width, V vocabulary rows, R replaced rows.
"""

from __future__ import annotations

import math
import threading
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
    learns = torch.is_grad_enabled()  # within `forward` it always is off, and parameters need a gradient all the same
    return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), rows.to(dtype), labels, span, learns)  # type: ignore[return-value]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, span: slice, learns: bool
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = _project(hidden, weight)  # (M, V) float32
            logits[:, span] = F.linear(hidden, rows).float()
        highest = logits.amax(dim=1)
        at_label = logits.gather(1, labels[:, None])[:, 0]
        # In place on the CPU, where this kernel reads all of a row before it writes; other devices promise nothing.
        probabilities = torch.softmax(logits, dim=1, out=logits if logits.device.type == "cpu" else None)
        log_total = -probabilities.amax(dim=1).log()  # of exp(logits - highest), of which the highest is 1
        if learns and any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden, weight, rows, labels)
            ctx.span = span
            ctx.probabilities = probabilities
        else:
            workspace.keep(probabilities)
        return log_total + highest - at_label

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, rows, labels = ctx.saved_tensors
        if ctx.probabilities is None:
            raise RuntimeError(
                "linear_cross_entropy: expected one backward, got a second; its buffer is used up. Next step: compute "
                "the loss anew for each backward, or add up what is derived from it and call backward once."
            )
        probabilities = ctx.probabilities
        ctx.probabilities = None
        of_logits = probabilities.mul_(grad[:, None])  # (M, V), in place again
        of_logits.scatter_add_(1, labels[:, None], -grad[:, None])
        of_logits = of_logits.to(weight.dtype)
        at_rows = of_logits[:, ctx.span].clone()  # (M, R)
        of_logits[:, ctx.span] = 0
        needs_hidden, needs_weight, needs_rows, *_ = ctx.needs_input_grad
        of_hidden = fast_linear(of_logits, weight.t()) + at_rows @ rows if needs_hidden else None
        of_weight = of_logits.t() @ hidden if needs_weight else None
        of_rows = at_rows.t() @ hidden if needs_rows else None
        workspace.keep(probabilities)
        return of_hidden, of_weight, of_rows, None, None, None


class Workspace:
    """The last buffer of logits on the CPU, for the next step.

    A buffer of 50 MB that is allocated anew takes as long to arrive from the system, page by page, as the projection
    takes to fill it. (On a GPU torch keeps memory itself.)
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None
        self._lock = threading.Lock()

    def take(self, *shape: int) -> Tensor:
        """Memory `shape` float32, whatever it holds; nobody else gets it before it is kept again."""
        with self._lock:
            kept, self._kept = self._kept, None
        size = math.prod(shape)
        if kept is None or not size <= kept.numel() <= 2 * size:
            with torch.inference_mode(False):  # a buffer that was made within it would fail in a later training step
                kept = torch.empty(size)
        return kept[:size].view(shape)

    def keep(self, buffer: Tensor) -> None:
        """Args:
        buffer: of `take`, of no more use to anyone else; or one of another device, which is let go.
        """
        if buffer.device.type == "cpu":
            with self._lock:
                self._kept = buffer.view(-1)

    def clear(self) -> None:
        """Let the memory go."""
        with self._lock:
            self._kept = None


workspace = Workspace()


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """`[M, V]` float32."""
    if hidden.device.type != "cpu":
        return F.linear(hidden, weight).float()
    logits = workspace.take(len(hidden), len(weight))
    if hidden.dtype == logits.dtype:
        return torch.mm(hidden, weight.t(), out=logits)
    return logits.copy_(F.linear(hidden, weight))
