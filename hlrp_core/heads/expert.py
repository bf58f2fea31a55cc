"""The flow-matching expert: a small transformer over action tokens that attends to a memory.

Shape legend: B batch, M memory tokens, C chunk length (action tokens), A action width, H width, N layers,
Q attention heads, G key and value heads, d width of an attention head.

What is notable:
- One joint attention per layer: the action tokens attend to [memory, action tokens] at once, both ways within the
  chunk, as a single `scaled_dot_product_attention`.
- The memory does not depend on the flow time, so its keys and values, those of all layers, come from one matrix
  product per chunk (`remember`) and are only read by the flow steps.
- The flow time reaches each layer as scale, shift and gate of its two branches (adaptive RMS norm with gates that
  start at zero: DiT, pi0.5). It is the same for the whole batch while sampling, so the modulations of all layers and
  all steps are one small matrix product per chunk (`modulation`).
- Memory tokens carry no position of their own: prefix hidden states have theirs from the backbone, codes from their
  embedding. A shift by padding thus cannot change anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp_core.heads.action_head import ActionHeadConfig
from hlrp_core.heads.layers import GatedMLP, TimeEmbedding, build_dropout, rms_norm

# Vectors by which the flow time modulates: (shift, scale, gate) for two branches; (shift, scale) at the end.
_PER_LAYER, _AT_END = 6, 2


@dataclass(frozen=True)
class ExpertMemory:
    """What the expert attends to, ready for every layer.

    Args:
        keys_values: `[N, 2, B, G, M, d]`.
        attention_bias: `[B, 1, 1, M + C]`: 0, or -inf on padding.
    """

    keys_values: Tensor
    attention_bias: Tensor

    def repeat(self, times: int) -> ExpertMemory:
        """Every row `times` times in a row."""
        if times == 1:
            return self
        keys_values = self.keys_values.repeat_interleave(times, dim=2)
        return ExpertMemory(keys_values, self.attention_bias.repeat_interleave(times, dim=0))


class ExpertLayer(nn.Module):
    """Joint attention and a gated MLP, both modulated by the flow time."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.resolved_num_kv_heads
        self.head_dim = config.resolved_head_dim
        self.queries_dim = self.num_heads * self.head_dim
        qkv_dim = self.queries_dim + 2 * self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_dim, qkv_dim, bias=False)
        self.attention_out = nn.Linear(self.queries_dim, config.hidden_dim, bias=False)
        self.mlp = GatedMLP(config.hidden_dim, config.resolved_mlp_dim)
        self.dropout = build_dropout(config.dropout)

    def forward(self, x: Tensor, modulation: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """`x` `[B, C, H]`, `modulation` `[B or 1, 6, 1, H]`, `memory` `[2, B, G, M, d]` -> `[B, C, H]`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(dim=1)
        attended = self.attend(torch.addcmul(shift, rms_norm(x), scale), memory, bias)
        x = torch.addcmul(x, self.dropout(attended), gate)
        out = self.mlp(torch.addcmul(mlp_shift, rms_norm(x), mlp_scale))
        return torch.addcmul(x, self.dropout(out), mlp_gate)

    def attend(self, x: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        B, C, _ = x.shape
        qkv = self.qkv(x)
        queries = qkv[..., : self.queries_dim].view(B, C, self.num_heads, self.head_dim).transpose(1, 2)
        own = qkv[..., self.queries_dim :].view(B, C, 2, self.num_kv_heads, self.head_dim)
        keys, values = torch.cat([memory, own.permute(2, 0, 3, 1, 4)], dim=3)  # each (B, G, M + C, d)
        grouped = self.num_kv_heads != self.num_heads
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=grouped)
        return self.attention_out(out.transpose(1, 2).reshape(B, C, self.queries_dim))


class FlowExpert(nn.Module):
    """Velocity of a noisy action chunk, given the flow time and a memory."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.config = config
        H, N = config.hidden_dim, config.num_layers
        self.action_in = nn.Linear(config.action_dim, H)
        self.action_positions = nn.Parameter(torch.randn(config.chunk_size, H) * H**-0.5)
        self.time_embedding = TimeEmbedding(config.time_dim)
        self.modulation_out = nn.Linear(config.time_dim, (_PER_LAYER * N + _AT_END) * H)
        self.memory_kv = nn.Linear(H, N * 2 * config.resolved_num_kv_heads * config.resolved_head_dim, bias=False)
        self.layers = nn.ModuleList(ExpertLayer(config) for _ in range(N))
        self.action_out = nn.Linear(H, config.action_dim)
        self._init_modulation()

    def _init_modulation(self) -> None:
        """Scale 1, shift 0, gate 0: every layer begins as the identity, and the flow time as absent."""
        nn.init.zeros_(self.modulation_out.weight)
        bias = torch.zeros(_PER_LAYER * self.config.num_layers + _AT_END, self.config.hidden_dim)
        bias[1::3] = 1.0  # (shift, scale, gate), (shift, scale, gate), ..., (shift, scale)
        with torch.no_grad():
            self.modulation_out.bias.copy_(bias.flatten())

    def remember(self, tokens: Tensor, valid_mask: Tensor) -> ExpertMemory:
        """The memory of `tokens` `[B, M, H]`, where `valid_mask` `[B, M]` is True."""
        config = self.config
        B, M, _ = tokens.shape
        heads = (config.num_layers, 2, config.resolved_num_kv_heads, config.resolved_head_dim)
        keys_values = self.memory_kv(rms_norm(tokens)).view(B, M, *heads)
        bias = torch.zeros(B, M + config.chunk_size, dtype=self.action_positions.dtype, device=tokens.device)
        bias[:, :M].masked_fill_(~valid_mask, float("-inf"))
        return ExpertMemory(keys_values.permute(2, 3, 0, 4, 1, 5), bias[:, None, None])

    def modulation(self, time: Tensor) -> Tensor:
        """Flow times `[B]` -> `[B, 6 N + 2, 1, H]`."""
        return self.modulation_out(self.time_embedding(time)).view(len(time), -1, 1, self.config.hidden_dim)

    def forward(self, x_t: Tensor, modulation: Tensor, memory: ExpertMemory) -> Tensor:
        """`x_t` `[B, C, A]`, `modulation` `[B or 1, 6 N + 2, 1, H]` -> velocity `[B, C, A]` float32."""
        x = self.action_in(x_t.to(self.action_in.weight.dtype)) + self.action_positions  # (B, C, H)
        *per_layer, at_end = modulation.split(_PER_LAYER, dim=1)
        for layer, vectors, keys_values in zip(self.layers, per_layer, memory.keys_values, strict=True):
            x = layer(x, vectors, keys_values, memory.attention_bias)
        shift, scale = at_end.unbind(dim=1)
        return self.action_out(torch.addcmul(shift, rms_norm(x), scale)).float()
