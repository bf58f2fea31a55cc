"""What the contract suite's tests share."""

from __future__ import annotations

import copy
from dataclasses import fields

import torch
from torch import Tensor

from hlrp_core import BackendMode
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.contract import ActionBatch, FoundationBatch, LatentOutput, LossOutput
from hlrp_core.heads import ACTION_HEADS
from hlrp_core.registry import get_recipe

CODES, ACTIONS, MULTITASK = BackendMode.CODES, BackendMode.ACTIONS, BackendMode.MULTITASK
HEADS = sorted(ACTION_HEADS)
ALL_HEADS = [None, *HEADS]
# All that is not the default, at once: each backend reads its own.
OTHER_SETTINGS = {"code_objective": "restricted", "latent_pooling": "query", "vector_objective": "flow"}
# Every head with the usual settings, and one with the others.
HEADS_AND_SETTINGS = [*[(head, {}) for head in ALL_HEADS], ("prefix_flow", OTHER_SETTINGS)]


def total_loss(backend: ComposedBackend, batch: FoundationBatch, mode: BackendMode, seed: int = 0) -> LossOutput:
    """The loss with fixed flow noise."""
    torch.manual_seed(seed)
    return backend.loss_from_batch(batch, mode=mode)


def predicted(latent: LatentOutput) -> Tensor:
    """What the head computed: logits `[B, S, K]`, or vectors `[B, S, D]` of a backend of continuous latents."""
    values = latent.vector if latent.logits is None else latent.logits
    assert values is not None
    return values


def conditioning_of(name: str, usual: str = "tokens") -> str:
    """`usual`, or what takes its place where vectors are predicted."""
    return "vector" if get_recipe(name).predicts_vectors else usual


def gradients(backend: ComposedBackend) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in backend.named_parameters() if p.grad is not None}


def snapshot(batch: ActionBatch) -> dict:
    return {f.name: copy.deepcopy(getattr(batch, f.name)) for f in fields(batch)}


def assert_unchanged(batch: ActionBatch, before: dict) -> None:
    for key, value in before.items():
        now = getattr(batch, key)
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, key


def rows_of(batch: ActionBatch, rows: list[int]) -> ActionBatch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("views", "meta")}
    picked = {key: value[rows] if isinstance(value, Tensor) else value for key, value in values.items()}
    picked["instructions"] = [batch.instructions[row] for row in rows]
    return ActionBatch(**picked)
