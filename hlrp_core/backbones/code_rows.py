"""Trainable rows for the code tokens, in place of theirs in frozen vocabulary tables.

A parameter is trained as a whole or not at all, so that training a few rows of a table of 150,000 costs a gradient, an
optimizer's moments and an update of all of them. Here the tables are frozen and the rows of the code tokens are
parameters of their own, which stand in wherever a table is read. A state dict holds them at both places: the tables
get the trained rows whenever one is taken (`ModelCore.train_code_rows`).

Shape legend: R code tokens with their wrapper, W hidden width, V vocabulary rows.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeRows(nn.Module):
    """Rows `[R, W]` of an embedding table and of a vocabulary projection `[V, W]`: one parameter where these are tied.

    It is called for its rows, rather than read, because an adapter (PEFT) replaces a module by one that it calls.

    Args:
        embedding, projection: the tables; frozen here.
        ids: of the code tokens, consecutive.
    """

    def __init__(self, embedding: Tensor, projection: Tensor, ids: Tensor):
        super().__init__()
        first, last = int(ids.min()), int(ids.max())
        assert last - first + 1 == len(ids), "code tokens have consecutive ids"
        self.span = slice(first, last + 1)
        for table in (embedding, projection):
            table.requires_grad_(False)
        self.embedding = nn.Parameter(embedding[self.span].clone())
        self.projection = self.embedding if projection is embedding else nn.Parameter(projection[self.span].clone())

    def forward(self, table: Literal["embedding", "projection"]) -> Tensor:
        """The rows `[R, W]` of one of the two tables."""
        return getattr(self, table)


def replace_embeddings(embeds: Tensor, ids: Tensor, rows: Tensor, span: slice) -> Tensor:
    """Embeddings `[..., W]` of `ids` `[...]`, with those of the ids in `span` taken from `rows` `[R, W]`."""
    at = ids - span.start
    is_code = (at >= 0) & (at < len(rows))
    return torch.where(is_code[..., None], F.embedding(at.clamp(0, len(rows) - 1), rows), embeds)


def replace_logits(logits: Tensor, hidden: Tensor, rows: Tensor, span: slice) -> Tensor:
    """Logits `[..., V]` of states `[..., W]`, with the columns `span` projected by `rows` `[R, W]`."""
    return torch.cat([logits[..., : span.start], F.linear(hidden, rows), logits[..., span.stop :]], dim=-1)
