"""A vocabulary table that both embeds tokens and projects onto them, with one gradient for the two uses.

Autograd would give the lookup a gradient of its own, zeros for every row of the vocabulary but those looked up, and add
it to that of the projection. With 150,000 rows, filling and adding it takes as long as the rest of a small model.

Shape legend: V vocabulary rows, W hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextmanager
def one_gradient(embedding: nn.Embedding, projection: nn.Linear) -> Iterator[Tensor]:
    """Gives the weights `[V, W]` to project with; lookups of `embedding` meanwhile share their gradient.

    Only where the two are tied and learn; else it gives `projection.weight` and changes nothing.
    """
    weight = projection.weight
    if embedding.weight is not weight or not (weight.requires_grad and torch.is_grad_enabled()):
        yield weight
        return
    for_lookup, for_projection = _TwoUses.apply(weight)  # type: ignore[misc]

    def look_up(module: nn.Embedding, args: tuple[Tensor], output: Tensor) -> Tensor:
        return F.embedding(args[0], for_lookup, module.padding_idx, sparse=True)

    hook = embedding.register_forward_hook(look_up)  # type: ignore[arg-type]
    try:
        yield for_projection
    finally:
        hook.remove()


class _TwoUses(torch.autograd.Function):
    """A table as two; the sparse gradient of the first is added into the rows of the dense one of the second."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_lookup: Tensor | None, of_projection: Tensor | None) -> Tensor | None:  # type: ignore[override]
        if of_lookup is None:
            return of_projection
        if of_projection is None:
            return of_lookup.to_dense()
        ids, values = of_lookup._indices()[0], of_lookup._values()  # an id may occur many times
        # In place: the projection's backward has just made it, and a copy would cost what all this saves.
        return of_projection.index_add_(0, ids, values)
