"""The losses of a training step, and their sum.

Shape legend: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hlrp_core.contract import LossOutput


@dataclass(frozen=True)
class MaskedLoss:
    """One loss, of the samples that have a label for it.

    Args:
        per_sample: `[B]`; anything where `mask` is False.
        mask: `[B]` bool.
        metrics: beside the loss itself.
    """

    per_sample: Tensor
    mask: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


def combine_losses(losses: dict[str, MaskedLoss], weights: dict[str, float]) -> LossOutput:
    """The weighted sum of the means over each loss's own samples; 0 where it has none. One alone has weight 1."""
    metrics: dict[str, float] = {}
    total: Tensor | float = 0.0
    per_sample_total: Tensor | float = 0.0
    for name, part in losses.items():
        weight = weights[name] if len(losses) > 1 else 1.0
        # where(), not a product: an unlabelled sample's loss may be anything, and 0 * inf is NaN
        per_sample = torch.where(part.mask, part.per_sample, 0)
        loss = per_sample.sum() / part.mask.sum().clamp(min=1)
        total = total + weight * loss
        per_sample_total = per_sample_total + weight * per_sample
        metrics[f"{name}_loss"] = loss.item()
        metrics |= part.metrics
    assert isinstance(total, Tensor) and isinstance(per_sample_total, Tensor)
    return LossOutput(loss=total, metrics=metrics, per_sample=per_sample_total)
