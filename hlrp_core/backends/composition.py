"""Puts a backend's parts together: what is the same whatever its code head is."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.expectation import expect
from hlrp_core.heads import build_action_head
from hlrp_core.heads.code_head import CodeHead
from hlrp_core.prompting.catalogue import PROMPTINGS


def keep_vocabulary(config: BackendConfig, core: ModelCore) -> None:
    """Where no codes are written as tokens, the vocabulary stays as it is. Nothing teaches its projection then, and an
    optimizer need not hold it.

    Raises:
        ValueError: a setting asks for code tokens.
    """
    if config.train_vocabulary == "code_rows":
        raise ValueError(
            f"train_vocabulary: expected 'all' with {config.name}, which adds no code tokens to the vocabulary, got "
            "'code_rows'. Next step: leave it out, or use a backend that writes codes as tokens."
        )
    if core.lm_head.weight is not core.model.get_input_embeddings().weight:
        core.lm_head.requires_grad_(False)


def check_decoding(config: BackendConfig) -> None:
    """What an action head needs of codes that are written as tokens. Known before anything is loaded.

    Raises:
        ValueError: their decoding does not give it.
    """
    head = config.action_head
    if head is None:
        return
    expect(
        head.code_conditioning == "none" or config.decoding != "free",
        "decoding",
        f"'constrained' or 'generate' with an action head that is conditioned on codes ('{head.kind}')",
        "'free', whose codes may fail to parse",
        "decoding=constrained.",
    )
    expect(
        head.code_conditioning != "soft" or config.decoding == "constrained",
        "code_conditioning=soft",
        "decoding='constrained', which gives logits",
        repr(config.decoding),
        "decoding=constrained, or code_conditioning=tokens.",
    )


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
