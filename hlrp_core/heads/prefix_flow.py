"""`prefix_flow`: a flow-matching expert that attends to the backbone's prefix hidden states.

Shape legend: B batch, L prefix tokens, W prefix width, H width of the head.
"""

from __future__ import annotations

from torch import Tensor, nn

from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.action_head import ActionContext, ContextSizes
from hlrp_core.heads.flow import FlowHead
from hlrp_core.heads.layers import rms_norm


class PrefixFlowHead(FlowHead):
    """The flow head with the prefix in its memory, beside the state and, where wanted, the codes.

    Any backbone serves it: the hidden states may have any width and scale.
    """

    needs_prefix = True

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        super().__init__(config, sizes)
        assert sizes.prefix_dim is not None  # checked above
        self.memory_tokens["prefix"] = nn.Linear(sizes.prefix_dim, config.hidden_dim)

    def _tokens_and_masks(self, context: ActionContext) -> list[tuple[Tensor, Tensor]]:
        assert context.prefix is not None
        valid_mask = context.prefix.valid_mask.bool()
        # Padding may hold anything, and its weight of 0 would not cancel a NaN.
        hidden = context.prefix.hidden.masked_fill(~valid_mask[..., None], 0.0)
        prefix = self.memory_tokens["prefix"](rms_norm(hidden.float()).to(self.dtype))  # (B, L, H)
        return [(prefix, valid_mask), *super()._tokens_and_masks(context)]
