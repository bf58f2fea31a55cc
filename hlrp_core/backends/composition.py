"""Puts a backend's parts together: what is the same whatever its code head is."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.heads import build_action_head
from hlrp_core.heads.code_head import CodeHead
from hlrp_core.prompting.catalogue import PROMPTINGS


def compose_backend(config: BackendConfig, core: ModelCore, *, prompting: str, code_head: CodeHead) -> ComposedBackend:
    """The backend of a core whose vocabulary is complete, with the prompting strategy and action head of `config`.

    Args:
        prompting: one of `PROMPTINGS`.
        code_head: made for this core.
    """
    action_head = None
    if config.action_head is not None:
        action_head = build_action_head(
            config.action_head,
            prefix_dim=core.hidden_dim,
            codebook_size=config.codebook_size,
            code_seq_len=config.code_seq_len,
        )
    return ComposedBackend(
        config,
        core=core,
        prompting=PROMPTINGS[prompting](core, config.prompt),
        code_head=code_head,
        action_head=action_head,
    )
