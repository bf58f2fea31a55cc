"""Backends that predict codes by a head on the prompt's hidden states: any core, any prompting."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.composition import compose_backend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.heads.latent_head import LatentHead


def compose_latent_backend(config: BackendConfig, core: ModelCore, *, prompting: str) -> ComposedBackend:
    """Compose the core, its vocabulary as it is, with a prompting strategy and the heads.

    Raises:
        ValueError: a setting asks for code tokens.
    """
    if config.train_vocabulary == "code_rows":
        raise ValueError(
            f"train_vocabulary: expected 'all' with {config.name}, which adds no code tokens to the vocabulary, got "
            "'code_rows'. Next step: leave it out, or use a backend that writes codes as tokens."
        )
    if core.lm_head.weight is not core.model.get_input_embeddings().weight:
        core.lm_head.requires_grad_(False)  # nothing is written, so nothing teaches it: an optimizer need not hold it
    head = LatentHead(
        core.hidden_dim,
        codebook_size=config.codebook_size,
        code_seq_len=config.code_seq_len,
        pooling=config.latent_pooling,
    )
    return compose_backend(config, core, prompting=prompting, code_head=head)
