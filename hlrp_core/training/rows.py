"""Batches taken apart and put together by their samples.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from hlrp_core.contract import FoundationBatch


def take_rows(batch: FoundationBatch, start: int, stop: int) -> FoundationBatch:
    """Samples `start` to `stop` of a batch; without `meta`, unless it is the whole batch."""
    if start == 0 and stop >= batch.batch_size:
        return batch

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cut(one) for name, one in value.items()}
        return None if value is None else value[start:stop]

    parts = {f.name: cut(getattr(batch, f.name)) for f in fields(batch) if f.name != "meta"}
    return replace(batch, **parts, meta=None)


def merge_batches(batches: Sequence[FoundationBatch]) -> list[FoundationBatch]:
    """The same samples in as few batches as possible: one for each form (image size, views, which labels, device)."""
    by_form: dict[Any, list[FoundationBatch]] = {}
    for batch in batches:
        by_form.setdefault(_form(batch), []).append(batch)
    return [_concatenate(alike) for alike in by_form.values()]


def _concatenate(batches: list[FoundationBatch]) -> FoundationBatch:
    if len(batches) == 1:
        return batches[0]

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        return None if values[0] is None else [one for value in values for one in value]

    parts = {f.name: join([getattr(b, f.name) for b in batches]) for f in fields(batches[0]) if f.name != "meta"}
    return replace(batches[0], **parts, meta=None)


def _form(batch: FoundationBatch) -> tuple[Any, ...]:
    """Equal for batches that can stand in one."""

    def describe(value: Any) -> Any:
        if isinstance(value, Mapping):
            return tuple((name, describe(one)) for name, one in value.items())
        if isinstance(value, Tensor):
            return (value.dtype, value.device, tuple(value.shape[1:]))
        return value is None

    return (type(batch), *(describe(getattr(batch, f.name)) for f in fields(batch) if f.name != "meta"))
