"""The loss of a training step, over samples that may not fit into one batch.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.contract import BackendMode, FoundationBatch, LossOutput


class CodeObjective(nn.Module):
    """The loss as a forward: what accelerate wraps for several devices and for mixed precision."""

    def __init__(self, backend: ComposedBackend):
        super().__init__()
        self.backend = backend

    def forward(self, batches: Sequence[FoundationBatch]) -> LossOutput:
        """The mean over the labelled samples of all batches, as if they were one."""
        outputs = [self.backend.loss_from_batch(batch, mode=BackendMode.CODES) for batch in batches]
        return mean_loss(outputs, [int(batch.codes_mask().sum()) for batch in batches])


def mean_loss(outputs: Sequence[LossOutput], sizes: Sequence[int]) -> LossOutput:
    """The loss, and the metrics, of batches with so many labelled samples each."""
    if len(outputs) == 1:
        return outputs[0]
    weights = [size / max(1, sum(sizes)) for size in sizes]  # without any label the losses are 0 each
    loss = sum(output.loss * weight for output, weight in zip(outputs, weights, strict=True))
    metrics: dict[str, float] = {}
    for output, weight in zip(outputs, weights, strict=True):
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + weight * value
    return LossOutput(loss, metrics)  # type: ignore[arg-type]
