"""Endless, resumable reading of any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from hlrp_core.contract import FoundationBatch


@runtime_checkable
class SeekableBatches(Protocol):
    """Batches that can be read from anywhere, so that a resumed run need not read what it has seen.

    A pass over the data with one number is always in the same order.
    """

    def read_from(self, epoch: int, start: int) -> Iterator[FoundationBatch]:
        """Pass `epoch` over the data, without its first `start` batches."""
        ...


class Stream(Protocol):
    """What a training loop reads: the samples of one step after another, without end."""

    @property
    def epoch(self) -> int:
        """Whole passes over all of the data."""
        ...

    def next_parts(self) -> list[tuple[str, FoundationBatch]]:
        """The samples of the next step, as batches with the name of the source that each is from."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON from which a stream over the same data goes on."""
        ...


class BatchStream:
    """One batch after another, beginning again where the data end.

    Args:
        batches: a `SeekableBatches`, or any iterable. A plain iterable must repeat itself for a run to be resumed
            exactly: its batches are read and thrown away up to where the run stopped.
        epoch, position: batches already read: whole passes, and those of the pass after them.
    """

    def __init__(self, batches: Iterable[FoundationBatch] | SeekableBatches, *, epoch: int = 0, position: int = 0):
        self._batches = batches
        self.epoch = epoch
        self.position = position
        self._reader = self._read()

    def _read(self) -> Iterator[FoundationBatch]:
        if isinstance(self._batches, SeekableBatches):
            return self._batches.read_from(self.epoch, self.position)
        return islice(self._batches, self.position, None)

    def next(self) -> FoundationBatch:
        """Raises:
        ValueError: the data are empty, or an iterator that cannot be read again has ended.
        """
        batch = next(self._reader, None)
        if batch is None:
            self.epoch, self.position = self.epoch + 1, 0
            self._reader = self._read()
            batch = next(self._reader, None)
        if batch is None:
            raise ValueError(
                "batches: expected an iterable that can be read again (a list, a DataLoader) or enough batches for all "
                f"steps, got one that has nothing left in pass {self.epoch}. Next step: pass a list or a DataLoader, "
                "or lower the number of steps."
            )
        self.position += 1
        return batch

    def next_parts(self) -> list[tuple[str, FoundationBatch]]:
        """See `Stream`; one source needs no name."""
        return [("", self.next())]

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}
