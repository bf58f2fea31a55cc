"""Backends that predict codes by a head on the prompt's hidden states: any core, any prompting."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.composition import compose_backend, keep_vocabulary
from hlrp_core.backends.config import BackendConfig
from hlrp_core.heads.latent_head import LatentHead


def compose_latent_backend(config: BackendConfig, core: ModelCore, *, prompting: str) -> ComposedBackend:
    """Compose the core, its vocabulary as it is, with a prompting strategy and the heads.

    Raises:
        ValueError: a setting asks for code tokens.
    """
    keep_vocabulary(config, core)
    head = LatentHead(
        core.hidden_dim,
        codebook_size=config.codebook_size,
        code_seq_len=config.code_seq_len,
        pooling=config.latent_pooling,
    )
    return compose_backend(config, core, prompting=prompting, code_head=head)
