"""Backends that predict a LAQ's code vectors by a head on the prompt's hidden states: any core, any prompting."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.composition import compose_backend, keep_vocabulary
from hlrp_core.backends.config import BackendConfig
from hlrp_core.heads.vector_head import VectorFlowHead, VectorHead, VectorRegressionHead


def compose_vector_backend(config: BackendConfig, core: ModelCore, *, prompting: str) -> ComposedBackend:
    """Compose the core, its vocabulary as it is, with a prompting strategy and the heads.

    Raises:
        ValueError: the width of the LAQ's code vectors is missing, or a setting asks for code tokens.
    """
    if config.code_vector_dim is None:
        raise ValueError(
            f"code vectors of backend '{config.name}': expected those of the LAQ that made the codes, got None. "
            "Next step: pass code_vectors=laq.code_vector_table()."
        )
    keep_vocabulary(config, core)
    return compose_backend(config, core, prompting=prompting, code_head=_build_head(config, core.hidden_dim))


def _build_head(config: BackendConfig, hidden_dim: int) -> VectorHead:
    assert config.code_vector_dim is not None
    sizes = {
        "codebook_size": config.codebook_size,
        "code_seq_len": config.code_seq_len,
        "code_vector_dim": config.code_vector_dim,
    }
    if config.vector_objective == "flow":
        return VectorFlowHead(hidden_dim, **sizes)
    return VectorRegressionHead(hidden_dim, pooling=config.latent_pooling, **sizes)
