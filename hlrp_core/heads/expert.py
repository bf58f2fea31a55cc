"""The flow-matching expert: a small transformer over action tokens that attends to a memory.

Shape legend: B batch, M memory tokens, C chunk length (action tokens), A action width, H width, N layers,
Q attention heads, G key and value heads, d width of an attention head.

What is notable:
- One joint attention per layer: the action tokens attend to [memory, action tokens] at once, both ways
  within the chunk, as a single `scaled_dot_product_attention`.
- The memory does not depend on the flow time, so its keys and values, those of all layers, come from one
  matrix product per chunk (`remember`) and are only read by the flow steps.
- The flow time reaches each layer as shift, scale and gate of its two branches (adaptive RMS norm: DiT,
  pi0.5). It is the same for the whole batch while sampling, so the modulations of all layers and all steps
  are one small product per chunk (`modulation`).
- Every layer begins close to the identity and the velocity close to zero. DiT closes its gates for that; here
  the gates start open and the last matrix of each branch starts small, so that the layers and the prefix get
  their gradient from the first step on (at a learning rate of 3e-4, half the error after a short training).
- Queries and keys are normalised and attention starts sharp. With logits of unit variance it begins as an
  average over the prefix, and finding the one token that matters can take thousands of steps or fail.
- Memory tokens carry no position of their own: prefix hidden states have theirs from the backbone, codes
  from their embedding. A shift by padding thus cannot change anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.layers import GatedMLP, TimeEmbedding, build_dropout, init_near_zero, rms_norm

# Vectors by which the flow time modulates: (shift, scale, gate) for two branches; (shift, scale) at the end.
_PER_LAYER, _AT_END = 6, 2
# Standard deviation of the attention logits at the start; see above.
_SHARPNESS = 3.0
# Added to the logits of masked tokens. Logits are at most _SHARPNESS * sqrt(d), so the weight is exactly 0, and
# unlike -inf it leaves no NaN behind where every token is masked.
_MASKED = -1e4


@dataclass(frozen=True)
class ExpertMemory:
    """What the expert attends to, ready for every layer.

    Args:
        keys: `[N, B, G, M, d]`, normalised.
        values: `[N, B, G, M, d]`.
        attention_bias: `[B, 1, 1, M + C]`: 0, or far below 0 on padding.
    """

    keys: Tensor
    values: Tensor
    attention_bias: Tensor

    def repeat(self, times: int) -> ExpertMemory:
        """Every row of the batch `times` times in a row."""
        if times == 1:
            return self
        keys, values = (part.repeat_interleave(times, dim=1) for part in (self.keys, self.values))
        return ExpertMemory(keys, values, self.attention_bias.repeat_interleave(times, dim=0))

    def hide_steps(self, is_pad: Tensor) -> ExpertMemory:
        """Nothing attends to the action tokens of the steps in `is_pad` `[B, C]`."""
        num_memory = self.keys.shape[-2]
        is_hidden = F.pad(is_pad, (num_memory, 0), value=False)[:, None, None]  # (B, 1, 1, M + C)
        return replace(self, attention_bias=self.attention_bias.masked_fill(is_hidden, _MASKED))


class ExpertLayer(nn.Module):
    """Joint attention and a gated MLP, both modulated by the flow time."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.resolved_num_kv_heads
        self.head_dim = config.resolved_head_dim
        qkv_dim = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_dim, qkv_dim, bias=False)
        self.attention_out = nn.Linear(self.num_heads * self.head_dim, config.hidden_dim, bias=False)
        self.mlp = GatedMLP(config.hidden_dim, config.resolved_mlp_dim)
        self.dropout = build_dropout(config.dropout)
        init_near_zero(self.attention_out)
        init_near_zero(self.mlp.down)

    def forward(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """`x` `[B, C, H]`, `modulation` `[B or 1, 6, 1, H]`, the memory's `[B, G, M, d]` -> `[B, C, H]`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(dim=1)
        attended = self.attend(torch.addcmul(shift, rms_norm(x), scale), keys, values, bias)
        x = torch.addcmul(x, self.dropout(attended), gate)
        out = self.mlp(torch.addcmul(mlp_shift, rms_norm(x), mlp_scale))
        return torch.addcmul(x, self.dropout(out), mlp_gate)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attention of `x` `[B, C, H]` to [memory, `x`]."""
        B, C, _ = x.shape
        Q, G = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(B, C, Q + 2 * G, self.head_dim).transpose(1, 2)  # (B, Q + 2 G, C, d)
        queries, own_keys = rms_norm(qkv[:, : Q + G]).split([Q, G], dim=1)
        out = F.scaled_dot_product_attention(
            queries,
            torch.cat([keys, own_keys], dim=2),  # (B, G, M + C, d)
            torch.cat([values, qkv[:, Q + G :]], dim=2),
            attn_mask=bias,
            scale=_SHARPNESS / math.sqrt(self.head_dim),
            enable_gqa=G != Q,
        )
        return self.attention_out(out.transpose(1, 2).flatten(2))  # (B, C, Q d) -> (B, C, H)


class FlowExpert(nn.Module):
    """Velocity of a noisy action chunk, given the flow time and a memory."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.config = config
        H, N = config.hidden_dim, config.num_layers
        G, d = config.resolved_num_kv_heads, config.resolved_head_dim
        self.action_in = nn.Linear(config.action_dim, H)
        self.action_positions = nn.Parameter(torch.randn(config.chunk_size, H) * H**-0.5)
        self.time_embedding = TimeEmbedding(config.time_dim)
        self.modulation_out = nn.Linear(config.time_dim, (_PER_LAYER * N + _AT_END) * H)
        self.memory_keys_values = nn.Linear(H, N * 2 * G * d, bias=False)
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(N))
        self.action_out = nn.Linear(H, config.action_dim)
        init_near_zero(self.action_out)
        self._init_modulation()

    def _init_modulation(self) -> None:
        """Scale 1, gate 1, shift 0: at the start the flow time changes nothing."""
        nn.init.zeros_(self.modulation_out.weight)
        vectors = torch.ones(_PER_LAYER * self.config.num_layers + _AT_END, self.config.hidden_dim)
        vectors[0::3] = 0.0  # (shift, scale, gate), (shift, scale, gate), ..., (shift, scale)
        with torch.no_grad():
            self.modulation_out.bias.copy_(vectors.flatten())

    def remember(self, tokens: Tensor, valid_mask: Tensor) -> ExpertMemory:
        """The memory of `tokens` `[B, M, H]`, where `valid_mask` `[B, M]` is True."""
        B, M, _ = tokens.shape
        G, d = self.config.resolved_num_kv_heads, self.config.resolved_head_dim
        keys_values = self.memory_keys_values(rms_norm(tokens)).view(B, M, -1, 2, G, d)
        keys, values = keys_values.permute(3, 2, 0, 4, 1, 5)  # each (N, B, G, M, d)
        # Additive, because a boolean mask would be turned into this one again in every layer and step.
        bias = torch.zeros(B, M, dtype=self.action_positions.dtype, device=tokens.device)
        bias = F.pad(bias.masked_fill(~valid_mask, _MASKED), (0, self.config.chunk_size))  # (B, M + C)
        return ExpertMemory(rms_norm(keys), values, bias[:, None, None])

    def modulation(self, time: Tensor) -> Tensor:
        """Flow times `[B]` -> `[B, 6 N + 2, 1, H]`."""
        return self.modulation_out(self.time_embedding(time)).view(len(time), -1, 1, self.config.hidden_dim)

    def forward(self, x_t: Tensor, modulation: Tensor, memory: ExpertMemory) -> Tensor:
        """`x_t` `[B, C, A]`, `modulation` `[B or 1, 6 N + 2, 1, H]` -> velocity `[B, C, A]` float32."""
        x = self.action_in(x_t.to(self.action_in.weight.dtype)) + self.action_positions  # (B, C, H)
        *per_layer, at_end = modulation.split(_PER_LAYER, dim=1)
        for layer, vectors, keys, values in zip(self.layers, per_layer, memory.keys, memory.values, strict=True):
            x = layer(x, vectors, keys, values, memory.attention_bias)
        shift, scale = at_end.unbind(dim=1)
        return self.action_out(torch.addcmul(shift, rms_norm(x), scale)).float()
