"""What an action head sees of codes, state and prompt.

Codes reach it as numbers: one-hot, as their distribution, or as the LAQ's standardised vectors, as the head's
`code_conditioning` says. Labels and predictions look alike, so that a head trained on the one can be used on the other.

Shape legend: B batch, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp_core.contract import LatentOutput
from hlrp_core.heads.action_head import ActionContext, ActionHead, PrefixEncoding
from hlrp_core.heads.code_head import CodeHead
from hlrp_core.heads.code_vectors import CodeVectors


def see_prediction(latent: LatentOutput, head: ActionHead, code_head: CodeHead) -> Tensor:
    """`[B, S, K]` codes or `[B, S, D]` vectors: what `head` sees of what `code_head` predicted."""
    if head.config.code_conditioning == "vector":
        assert latent.vector is not None
        return vector_table(code_head).standardize(latent.vector)
    if head.config.code_conditioning == "soft":
        assert latent.logits is not None
        return torch.softmax(latent.logits, dim=-1)
    assert latent.tokens is not None
    return _one_hot(latent.tokens, head)


def see_labels(codes: Tensor, head: ActionHead, code_head: CodeHead) -> Tensor:
    """What `head` sees of true codes `[B, S]`."""
    if head.config.code_conditioning == "vector":
        return vector_table(code_head).lookup(codes)
    return _one_hot(codes, head)


def build_context(
    head: ActionHead, *, state: Tensor | None, prefix: PrefixEncoding | None, seen: Tensor | None
) -> ActionContext:
    """Args:
    seen: of `see_prediction` or `see_labels`; None where the head sees no codes.
    """
    is_vector = head.config.code_conditioning == "vector"
    return ActionContext(
        state=state,
        code_probs=None if is_vector else seen,
        code_vectors=seen if is_vector else None,
        prefix=prefix if head.needs_prefix else None,
    )


def vector_table(code_head: CodeHead) -> CodeVectors:
    """The LAQ's vectors, as a code head keeps them that predicts vectors."""
    table = code_head.table  # the head may be wrapped by adapters, so its type says nothing
    assert isinstance(table, CodeVectors)
    return table


def _one_hot(codes: Tensor, head: ActionHead) -> Tensor:
    return F.one_hot(codes, head.sizes.codebook_size).float()
