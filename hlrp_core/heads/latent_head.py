"""Codes by a small head on the prompt's hidden states, all positions at once: nothing is written or decoded.

The prefix is summed up as one vector (`mean`, `last`) or as one for each code position (`query`), and two layers turn
that into logits. It is computed in the head's own precision, float32 under autocast too: the head is small.

Shape legend: B batch, L prefix tokens, W hidden width, S code positions, K codebook size, P vectors that the prefix is
pooled into (1 or S), H attention heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.codes.decoding import pick_codes
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.action_head import PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead, CodeLoss, sum_code_log_probs
from hlrp_core.heads.layers import rms_norm
from hlrp_core.prompting.strategy import PromptInputs

_ATTENTION_HEAD_DIM = 64


class LatentHead(CodeHead):
    """Logits `[B, S, K]` from a prefix; codes are their best entries.

    Args:
        hidden_dim: W.
        codebook_size: K.
        code_seq_len: S.
        pooling: `mean` over the prefix tokens, the `last` one alone, or a learned `query` for each code position that
            attends to all of them.
    """

    def __init__(self, hidden_dim: int, *, codebook_size: int, code_seq_len: int, pooling: str = "mean"):
        super().__init__()
        self.code_seq_len = code_seq_len
        self.pool = POOLINGS[pooling](hidden_dim, code_seq_len)
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.weight = nn.Parameter(torch.randn(code_seq_len, hidden_dim, codebook_size) * hidden_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(code_seq_len, codebook_size))

    def forward(self, prefix: PrefixEncoding) -> Tensor:
        """Logits `[B, S, K]` float32."""
        with torch.autocast(prefix.hidden.device.type, enabled=False):
            # padding may hold anything, and a weight of 0 would not cancel a NaN
            hidden = prefix.hidden.float().masked_fill(~prefix.valid_mask[..., None], 0.0)  # (B, L, W)
            pooled = self.pool(rms_norm(hidden).to(self.weight.dtype), prefix.valid_mask)  # (B, P, W)
            features = F.silu(self.hidden(rms_norm(pooled))).expand(-1, self.code_seq_len, -1)  # (B, S, W)
            return (torch.einsum("bsw,swk->bsk", features, self.weight) + self.bias).float()

    def completion(self, codes: Tensor) -> None:
        return None

    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss:
        logits = self(encoding.prefix)
        per_code = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (B, S)
        return CodeLoss(per_code.mean(1), logits.detach().argmax(-1))

    def log_prob(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> Tensor:
        """The code positions are independent given the prompt."""
        return sum_code_log_probs(self(encoding.prefix), codes)

    def predict(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        if encoding is not None:
            prefix = encoding.prefix
        else:
            hidden, _ = core(inputs.tokens, inputs.images)
            prefix = PrefixEncoding(hidden, inputs.tokens.valid_mask)
        logits = self(prefix)
        codes = pick_codes(logits.flatten(0, 1), sampling).unflatten(0, logits.shape[:2])  # (B, S)
        return LatentOutput(logits=logits, tokens=codes)


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
