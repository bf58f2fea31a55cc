"""`mlp`: action chunks by direct regression from codes and state.

Shape legend: B batch, S code positions, H width, D state width, C chunk length, A action width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.action_head import (
    ActionContext,
    ActionHead,
    ContextSizes,
    build_code_embedding,
    mean_over_steps,
)
from hlrp_core.heads.layers import GatedMLP, build_dropout, init_near_zero, rms_norm


class ResidualMLP(nn.Module):
    """A pre-norm residual branch that starts close to zero."""

    def __init__(self, config: ActionHeadConfig):
        super().__init__()
        self.mlp = GatedMLP(config.hidden_dim, config.resolved_mlp_dim)
        self.dropout = build_dropout(config.dropout)
        init_near_zero(self.mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mlp(rms_norm(x)))


class MLPHead(ActionHead):
    """A residual MLP on the embedded codes and the state.

    The loss is L1: where demonstrations disagree the answer is their median, which a few odd ones do not move,
    and its gradient does not fade near the target, so small corrections are learned as well as large ones (ACT
    and OpenVLA-OFT report finer control than with squared error). One input has one answer; a task whose answers
    come in several modes needs a flow head.
    """

    needs_prefix = False
    supports_guidance = False

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        super().__init__(config, sizes)
        H = config.hidden_dim
        self.codes, code_dim = self._build_codes()
        self.layer_in = nn.Linear(sizes.code_seq_len * code_dim + config.state_dim, H)
        self.layers = nn.Sequential(*[ResidualMLP(config) for _ in range(config.num_layers)])
        self.layer_out = nn.Linear(H, config.chunk_size * config.action_dim)

    def _build_codes(self) -> tuple[nn.Module, int]:
        """What turns `read_codes` into features `[B, S, dim]`, and their `dim`."""
        return build_code_embedding(self.config, self.sizes), self.config.hidden_dim

    def forward(self, context: ActionContext) -> Tensor:
        """`[B, C, A]` float32."""
        self.check_context(context)
        features = self.codes(self.read_codes(context)).flatten(1)  # (B, S * dim)
        if self.needs_state:
            assert context.state is not None
            features = torch.cat([features, context.state.to(features.dtype)], dim=-1)
        out = self.layer_out(rms_norm(self.layers(self.layer_in(features))))
        return out.float().view(-1, self.config.chunk_size, self.config.action_dim)

    def per_sample_loss(self, context: ActionContext, actions: Tensor, is_pad: Tensor | None) -> Tensor:
        actions = self.read_labels(actions, is_pad, self.check_context(context))
        error = F.l1_loss(self(context), actions, reduction="none")
        return mean_over_steps(error, is_pad)

    def predict(self, context: ActionContext, sampling: SamplingOptions) -> Tensor:
        if sampling.prev_chunk_left_over is not None:
            raise ValueError(
                f"prev_chunk_left_over for action head '{self.config.kind}': expected None, because a regression has "
                "no steps to guide, got a chunk. "
                "Next step: switch real-time chunking off, or use the head 'flow' or 'prefix_flow'."
            )
        return self(context)
