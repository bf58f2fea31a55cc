"""The loss of a training step, over samples that may not fit into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.losses import MaskedLoss
from hlrp_core.contract import BackendMode, FoundationBatch, LossOutput


class TrainingObjective(nn.Module):
    """The loss as a forward: what accelerate wraps for several devices and for mixed precision."""

    def __init__(self, backend: ComposedBackend, mode: BackendMode):
        super().__init__()
        self.backend = backend
        self.mode = mode

    def forward(self, batches: Sequence[FoundationBatch]) -> LossOutput:
        """Of all batches, as if they were one: each loss is the mean over all samples that have a label for it."""
        parts = [self.backend.losses_of_samples(batch, mode=self.mode) for batch in batches]
        return self.backend.combine({name: join_losses([part[name] for part in parts]) for name in parts[0]})


def join_losses(parts: Sequence[MaskedLoss]) -> MaskedLoss:
    """One loss over the samples of all parts; its metrics are means over those that have a label."""
    if len(parts) == 1:
        return parts[0]
    mask = torch.cat([part.mask for part in parts])
    metrics: dict[str, float] = {}
    for part in parts:
        share = part.mask.sum().item() / max(1, mask.sum().item())
        for name, value in part.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + share * value
    return MaskedLoss(torch.cat([part.per_sample for part in parts]), mask, metrics)
