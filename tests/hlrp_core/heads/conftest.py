"""Tiny heads and the inputs that fit them. B = 5, L = 7, W = 12, S = 3, K = 6, D = 4, C = 8, A = 2.

A LAQ's code vectors are of width 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hlrp_core.heads import (
    ActionContext,
    ActionHead,
    ActionHeadConfig,
    PrefixEncoding,
    build_action_head,
    hand_over_code_vectors,
)

REGRESSIONS = ("mlp", "laq")
SIZES = {"prefix_dim": 12, "codebook_size": 6, "code_seq_len": 3}
STATE_DIM, CHUNK, ACTION_DIM = 4, 8, 2
CODE_VECTORS = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(5))  # (S, K, D)


@pytest.fixture
def build() -> Callable[..., ActionHead]:
    """Builds a head whose weights are some way off their initial values, where the flow time says nothing yet."""

    def build(kind: str, *, seed: int = 0, is_fresh: bool = False, **settings: Any) -> ActionHead:
        torch.manual_seed(seed)
        defaults = {"hidden_dim": 32, "num_layers": 2, "num_heads": 4, "time_dim": 16, "num_flow_steps": 4}
        sizes = {"state_dim": STATE_DIM, "chunk_size": CHUNK, "action_dim": ACTION_DIM, "code_conditioning": "soft"}
        if kind == "laq":
            sizes["code_vector_dim"] = 2
        config = ActionHeadConfig(**{"kind": kind, **defaults, **sizes, **settings})
        head = build_action_head(config, **SIZES).eval()
        hand_over_code_vectors(head, CODE_VECTORS if kind == "laq" else None)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.0 if is_fresh else 0.1 * torch.randn_like(parameter))
        return head

    return build


@pytest.fixture
def make_context() -> Callable[..., ActionContext]:
    def make_context(batch_size: int = 5, *, length: int = 7, seed: int = 1) -> ActionContext:
        generator = torch.Generator().manual_seed(seed)
        valid_mask = torch.ones(batch_size, length, dtype=torch.bool)
        valid_mask[::2, :2] = False
        logits = torch.randn(batch_size, SIZES["code_seq_len"], SIZES["codebook_size"], generator=generator)
        return ActionContext(
            state=torch.randn(batch_size, STATE_DIM, generator=generator),
            code_probs=F.softmax(logits, dim=-1),
            prefix=PrefixEncoding(
                torch.randn(batch_size, length, SIZES["prefix_dim"], generator=generator), valid_mask
            ),
        )

    return make_context


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.randn(5, CHUNK, ACTION_DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def is_pad() -> torch.Tensor:
    """Rows with 0, 1, 3 and 7 padded steps, and one with all of them."""
    return torch.arange(CHUNK) >= torch.tensor([8, 7, 5, 1, 0])[:, None]


def select(context: ActionContext, rows: slice) -> ActionContext:
    prefix = PrefixEncoding(context.prefix.hidden[rows], context.prefix.valid_mask[rows])
    return ActionContext(context.state[rows], context.code_probs[rows], prefix)


@pytest.fixture(name="select")
def select_fixture() -> Callable[[ActionContext, slice], ActionContext]:
    return select


@pytest.fixture
def fixed_loss() -> Callable[..., torch.Tensor]:
    """`per_sample_loss` without chance: flow heads get a noise and a time for each row."""

    def fixed_loss(head: ActionHead, context, actions, is_pad, rows: slice = slice(None)) -> torch.Tensor:
        if head.config.kind in REGRESSIONS:
            return head.per_sample_loss(context, actions, is_pad)
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(5, CHUNK, ACTION_DIM, generator=generator)[rows]
        time = torch.rand(5, generator=generator)[rows]
        return head.per_sample_loss(context, actions, is_pad, noise=noise, time=time)

    return fixed_loss
