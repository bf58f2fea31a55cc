from __future__ import annotations

import pytest
import torch

from hlrp_core.contract import FoundationBatch
from hlrp_core.training import BatchStream, SeekableBatches


def batch(number: int) -> FoundationBatch:
    return FoundationBatch(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), [str(number)])


def names(stream: BatchStream, count: int) -> list[str]:
    return [stream.next().instructions[0] for _ in range(count)]


class Seekable:
    """Passes in an order of their own: 3 batches, named by pass and place."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def read_from(self, epoch: int, start: int):
        self.calls.append((epoch, start))
        return (batch(10 * epoch + place) for place in range(start, 3))


def test_it_begins_again_where_the_data_end():
    stream = BatchStream([batch(0), batch(1)])
    assert names(stream, 5) == ["0", "1", "0", "1", "0"]
    assert (stream.epoch, stream.position) == (2, 1)


def test_it_goes_on_from_anywhere():
    for read in range(8):
        first = BatchStream([batch(i) for i in range(3)])
        names(first, read)
        second = BatchStream([batch(i) for i in range(3)], epoch=first.epoch, position=first.position)
        assert names(second, 4) == names(first, 4)


def test_seekable_data_are_not_read_up_to_there():
    source = Seekable()
    assert isinstance(source, SeekableBatches)
    stream = BatchStream(source, epoch=1, position=2)
    assert source.calls == [(1, 2)]
    assert names(stream, 3) == ["12", "20", "21"]
    assert source.calls == [(1, 2), (2, 0)]


def test_an_iterator_is_enough_while_it_lasts():
    stream = BatchStream(iter([batch(0), batch(1)]))
    assert names(stream, 2) == ["0", "1"]
    with pytest.raises(ValueError, match="can be read again"):
        stream.next()


def test_empty_data():
    with pytest.raises(ValueError, match="nothing left"):
        BatchStream([]).next()
