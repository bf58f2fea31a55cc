"""Numbers for each code position, read off a prefix: pooled, then two layers.

The prefix is summed up as one vector (`mean`, `last`) or as one for each code position (`query`). All is computed in
the readout's own precision, float32 under autocast too: it is small.

Shape legend: B batch, L prefix tokens, W hidden width, S code positions, O outputs of a position, P vectors that the
prefix is pooled into (1 or S), H attention heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hlrp_core.heads.action_head import PrefixEncoding
from hlrp_core.heads.layers import rms_norm

_ATTENTION_HEAD_DIM = 64


class PooledReadout(nn.Module):
    """A prefix -> `[B, S, O]`.

    Args:
        hidden_dim: W.
        code_seq_len: S.
        output_dim: O.
        pooling: `mean` over the prefix tokens, the `last` one alone, or a learned `query` for each code position that
            attends to all of them.
    """

    def __init__(self, hidden_dim: int, *, code_seq_len: int, output_dim: int, pooling: str):
        super().__init__()
        self.code_seq_len = code_seq_len
        self.pool = POOLINGS[pooling](hidden_dim, code_seq_len)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.weight = nn.Parameter(torch.randn(code_seq_len, hidden_dim, output_dim) * hidden_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(code_seq_len, output_dim))

    def forward(self, prefix: PrefixEncoding) -> Tensor:
        """`[B, S, O]` float32."""
        with torch.autocast(prefix.hidden.device.type, enabled=False):
            # padding may hold anything, and a weight of 0 would not cancel a NaN
            hidden = prefix.hidden.float().masked_fill(~prefix.valid_mask[..., None], 0.0)  # (B, L, W)
            pooled = self.pool(rms_norm(hidden).to(self.weight.dtype), prefix.valid_mask)  # (B, P, W)
            features = F.silu(self.hidden(rms_norm(pooled))).expand(-1, self.code_seq_len, -1)  # (B, S, W)
            return (torch.einsum("bsw,swo->bso", features, self.weight) + self.bias).float()


# Each takes hidden states `[B, L, W]`, 0 on padding, and the mask `[B, L]`, and gives `[B, P, W]`.


class MeanPooling(nn.Module):
    """The mean over the tokens that are not padding."""

    def __init__(self, hidden_dim: int, code_seq_len: int):
        super().__init__()

    def forward(self, hidden: Tensor, valid_mask: Tensor) -> Tensor:
        return (hidden.sum(1) / valid_mask.sum(1, keepdim=True))[:, None]


class LastPooling(nn.Module):
    """The last token that is not padding, on whichever side that is: under a causal mask it has seen all others."""

    def __init__(self, hidden_dim: int, code_seq_len: int):
        super().__init__()

    def forward(self, hidden: Tensor, valid_mask: Tensor) -> Tensor:
        steps = torch.arange(valid_mask.shape[1], device=valid_mask.device)
        last = (steps * valid_mask).argmax(1)  # (B,)
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))


class QueryPooling(nn.Module):
    """A learned query for each code position attends to the tokens that are not padding."""

    def __init__(self, hidden_dim: int, code_seq_len: int):
        super().__init__()
        self.num_heads = hidden_dim // _ATTENTION_HEAD_DIM if hidden_dim % _ATTENTION_HEAD_DIM == 0 else 1
        self.queries = nn.Parameter(torch.randn(code_seq_len, hidden_dim))
        self.key_value = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)

    def forward(self, hidden: Tensor, valid_mask: Tensor) -> Tensor:
        keys, values = rearrange(self.key_value(hidden), "b l (two h d) -> two b h l d", two=2, h=self.num_heads)
        queries = rearrange(self.queries, "s (h d) -> h s d", h=self.num_heads).expand(len(hidden), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(queries, keys, values, attn_mask=valid_mask[:, None, None, :])
        return rearrange(pooled, "b h s d -> b s (h d)")


POOLINGS = {"mean": MeanPooling, "last": LastPooling, "query": QueryPooling}
