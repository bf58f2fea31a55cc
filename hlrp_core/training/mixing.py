"""Several sources of samples in one training run, in shares that are given.

Each sample of a step is drawn from a source at random with the given weights, whatever the sizes of the sources. A
source is read in passes of its own, one after another: a small one with a large weight is seen more often than a large
one with a small weight. There is no common epoch; how far each source has been read is reported for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hlrp_core.contract import FoundationBatch
from hlrp_core.training.batches import BatchStream, SeekableBatches, Stream
from hlrp_core.training.rows import take_rows


@dataclass(frozen=True)
class MixedBatches:
    """What `train_codes` takes instead of batches to learn from several sources at once.

    The samples of a step need not be of one image size: those of each size are a batch of their own, and the step's
    loss is the mean over all samples.

    Args:
        sources: by name; each a `SeekableBatches`, or an iterable that can be read again, of labelled batches of any
            size, in this process's share of the data.
        weights: for each name a number above 0. A source's share of the samples is its weight over the sum of all; a
            source's size plays no part.
        batch_size: B, samples of a step.
        seed: of the draws. They depend on it and on the number of the step alone, so that all processes of a run
            draw alike.

    Raises:
        ValueError: no source, a weight that is missing, too many, or not above 0, or no samples.
    """

    sources: Mapping[str, Iterable[FoundationBatch] | SeekableBatches]
    weights: Mapping[str, float]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        names = ", ".join(self.sources) or "none"
        if not self.sources or self.sources.keys() != self.weights.keys():
            raise ValueError(
                f"weights: expected one for each of the sources ({names}), got {', '.join(self.weights) or 'none'}. "
                "Next step: give every source a weight."
            )
        wrong = [f"{name}={weight}" for name, weight in self.weights.items() if not 0 < weight < math.inf]
        if wrong:
            raise ValueError(
                f"weights: expected numbers above 0, got {', '.join(wrong)}. Next step: leave a source out that is not "
                "to be drawn."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}. Next step: raise it.")

    @property
    def shares(self) -> dict[str, float]:
        """The share of the samples that each source is drawn with; their sum is 1."""
        total = sum(self.weights.values())
        return {name: self.weights[name] / total for name in self.sources}

    def draw(self, step: int) -> dict[str, int]:
        """How many of a step's samples each source gives; step 0 is the first."""
        counts = np.random.default_rng([self.seed, step]).multinomial(self.batch_size, list(self.shares.values()))
        return dict(zip(self.sources, counts.tolist(), strict=True))


class MixedStream:
    """The samples of one step after another, as `MixedBatches` says.

    Args:
        mix: the sources.
        state: of a stream over the same sources, which this one continues.
    """

    def __init__(self, mix: MixedBatches, state: dict[str, Any] | None = None):
        self._mix = mix
        self._step = 0 if state is None else state["step"]
        readers = {} if state is None else state["sources"]
        self._readers = {name: _SampleReader(source, **readers.get(name, {})) for name, source in mix.sources.items()}

    @property
    def epochs(self) -> dict[str, int]:
        """Whole passes over each source."""
        return {name: reader.epoch for name, reader in self._readers.items()}

    @property
    def epoch(self) -> int:
        """Whole passes over every source: those of the one that has been read least."""
        return min(self.epochs.values())

    def next_parts(self) -> list[tuple[str, FoundationBatch]]:
        """See `Stream`.

        Raises:
            ValueError: a source is empty, or an iterator that cannot be read again has ended.
        """
        counts = self._mix.draw(self._step)
        self._step += 1
        return [(name, batch) for name, reader in self._readers.items() for batch in reader.take(counts[name])]

    def state(self) -> dict[str, Any]:
        return {"step": self._step, "sources": {name: reader.state() for name, reader in self._readers.items()}}


class _SampleReader:
    """Any number of samples at a time, from batches of any size.

    Args:
        epoch, position: whole batches that were used up before, as in `BatchStream`.
        row: samples used up of the batch after those.
    """

    def __init__(self, batches: Iterable[FoundationBatch] | SeekableBatches, epoch: int = 0, position: int = 0, row=0):
        self._stream = BatchStream(batches, epoch=epoch, position=position)
        self._batch: FoundationBatch | None = None  # the one that is being used up
        self._row = row

    @property
    def epoch(self) -> int:
        return self._stream.epoch

    def take(self, count: int) -> list[FoundationBatch]:
        """The next `count` samples, as parts of the batches that they stand in."""
        parts = []
        while count > 0:
            if self._batch is None:
                self._batch = self._stream.next()
            size = self._batch.batch_size
            stop = min(self._row + count, size)
            parts.append(take_rows(self._batch, self._row, stop))
            count -= stop - self._row
            self._row = stop
            if stop == size:
                self._batch, self._row = None, 0
        return parts

    def state(self) -> dict[str, int]:
        used_up = self._stream.position - (self._batch is not None)
        return {"epoch": self._stream.epoch, "position": used_up, "row": self._row}


def open_stream(
    batches: Iterable[FoundationBatch] | SeekableBatches | MixedBatches, state: dict[str, Any] | None = None
) -> Stream:
    """The samples of one step after another, from one source or several.

    Args:
        state: of a stream over the same data, which this one continues.
    """
    if isinstance(batches, MixedBatches):
        return MixedStream(batches, state)
    return BatchStream(batches, **(state or {}))
