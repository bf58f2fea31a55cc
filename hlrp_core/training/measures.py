"""What a training run measures of itself while it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import ActionBatch, FoundationBatch, LossOutput


class Window:
    """Means of what the steps since the last line of metrics measured."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.num_samples = 0
        self.seconds = 0.0

    def add(self, output: LossOutput, grad_norm: float, num_samples: int, seconds: float) -> None:
        measured = {"loss": output.loss.item()}
        if math.isfinite(grad_norm):  # else the step was skipped: float16 tries a loss scale that is too large
            measured["grad_norm"] = grad_norm
        # without any valid code a batch has no figures of codes
        for name in ("code_accuracy", "vector_loss", "constant_vector_loss"):
            if name in output.metrics:
                measured[name] = output.metrics[name]
        if "actions_loss" in output.metrics:  # which parts the loss is a sum of
            measured |= {name: output.metrics[name] for name in ("codes_loss", "actions_loss")}
        for name, value in measured.items():
            self.values.setdefault(name, []).append(value)
        self.num_samples += num_samples
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.values.items()}


class Drawn:
    """The samples, and their labels, that a run has trained on so far, by source.

    They are counted where the samples are used, and know nothing of the weights they were drawn with.
    """

    def __init__(self, codebook_size: int, code_seq_len: int):
        self._sizes = (codebook_size, code_seq_len)
        self.samples: dict[str, int] = {}
        self.codes: dict[str, CodeCounts] = {}
        self.actions: dict[str, int] = {}  # samples that supervise actions; of sources that could

    def add(self, source: str, batch: FoundationBatch) -> None:
        self.samples[source] = self.samples.get(source, 0) + batch.batch_size
        counts = self.codes.setdefault(source, CodeCounts(*self._sizes))
        mask = batch.codes_mask()
        if batch.target_codes is not None and bool(mask.any()):
            counts.add(batch.target_codes[mask.to(batch.target_codes.device)])
        if isinstance(batch, ActionBatch) and batch.actions is not None:
            self.actions[source] = self.actions.get(source, 0) + int(batch.actions_mask().sum())

    @property
    def all_codes(self) -> CodeCounts:
        """Of all sources together."""
        return CodeCounts.total(list(self.codes.values()), *self._sizes)

    def shares(self) -> dict[str, float]:
        """Share of all samples so far."""
        total = max(1, sum(self.samples.values()))
        return {source: count / total for source, count in self.samples.items()}

    def record(self, epochs: Mapping[str, int], *, num_processes: int = 1) -> dict[str, dict[str, Any]]:
        """For the metrics: samples, their share and whole passes of each source; where actions are learned, how many
        samples supervised codes, and how many actions.

        Args:
            epochs: of every source; one that was never drawn is listed, too.
            num_processes: that draw alike; this one's samples are a share of all.
        """
        shares, found = self.shares(), {}
        for source, epoch in epochs.items():
            of: dict[str, Any] = {"samples": self.samples.get(source, 0) * num_processes}
            of |= {"share": shares.get(source, 0.0), "epoch": epoch}
            if self.actions:
                codes = self.codes.get(source)
                of["codes"] = 0 if codes is None else int(codes.counts[0].sum()) * num_processes
                of["actions"] = self.actions.get(source, 0) * num_processes
            found[source] = of
        return found

    def state(self) -> dict[str, Any]:
        """JSON, for `restore`."""
        codes = {name: counts.state() for name, counts in self.codes.items()}
        return {"samples": self.samples, "actions": self.actions, "codes": codes}

    def restore(self, state: dict[str, Any]) -> None:
        self.samples, self.actions = dict(state["samples"]), dict(state["actions"])
        self.codes = {name: CodeCounts.from_state(counts) for name, counts in state["codes"].items()}


def shorten(record: dict[str, Any]) -> dict[str, str]:
    """A line of metrics as the progress bar shows it."""
    shown = {"loss": f"{record['loss']:.3f}", "accuracy": f"{record.get('code_accuracy', 0):.3f}"}
    if "drawn" in record:
        shown["drawn"] = ", ".join(f"{source} {100 * of['share']:.1f}%" for source, of in record["drawn"].items())
    return shown
