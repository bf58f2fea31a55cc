"""Action heads: from codes, state and a backbone's prefix to chunks of continuous actions."""

from __future__ import annotations

from hlrp_core.expectation import expect_choice
from hlrp_core.heads.action_config import ActionExpertConfig, ActionHeadConfig, CodeConditioning
from hlrp_core.heads.action_head import ActionContext, ActionHead, ContextSizes, PrefixEncoding
from hlrp_core.heads.code_vectors import hand_over_code_vectors
from hlrp_core.heads.flow import FlowHead
from hlrp_core.heads.flow_matching import Guidance
from hlrp_core.heads.laq_decoder import LAQDecoderHead
from hlrp_core.heads.mlp import MLPHead
from hlrp_core.heads.prefix_flow import PrefixFlowHead

ACTION_HEADS: dict[str, type[ActionHead]] = {
    "mlp": MLPHead,
    "flow": FlowHead,
    "prefix_flow": PrefixFlowHead,
    "laq": LAQDecoderHead,
}


def build_action_head(
    config: ActionHeadConfig, *, prefix_dim: int | None, codebook_size: int, code_seq_len: int
) -> ActionHead:
    """The head that `config.kind` names, with fresh weights. The table of a `laq` head is still empty, see
    `hand_over_code_vectors`.

    Args:
        config: settings and sizes of the head.
        prefix_dim: width of the backbone's hidden states; None where there is no prefix.
        codebook_size: K.
        code_seq_len: S.

    Raises:
        ValueError: unknown kind (the closest name is offered), or the head lacks something it needs.
    """
    expect_choice("action head kind", config.kind, ACTION_HEADS)
    sizes = ContextSizes(prefix_dim=prefix_dim, codebook_size=codebook_size, code_seq_len=code_seq_len)
    return ACTION_HEADS[config.kind](config, sizes)


__all__ = [
    "ACTION_HEADS",
    "ActionContext",
    "ActionExpertConfig",
    "ActionHead",
    "ActionHeadConfig",
    "CodeConditioning",
    "ContextSizes",
    "FlowHead",
    "Guidance",
    "LAQDecoderHead",
    "MLPHead",
    "PrefixEncoding",
    "PrefixFlowHead",
    "build_action_head",
    "hand_over_code_vectors",
]
