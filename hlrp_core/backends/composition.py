"""Puts a backend's parts together: what is the same whatever its code head is."""

from __future__ import annotations

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.expectation import expect
from hlrp_core.heads import ActionHeadConfig, build_action_head
from hlrp_core.heads.code_head import CodeHead
from hlrp_core.heads.code_tokens import CodeTokenHead
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


def compose_backend(config: BackendConfig, core: ModelCore, *, prompting: str, code_head: CodeHead) -> ComposedBackend:
    """The backend of a core whose vocabulary is complete, with the prompting strategy and action head of `config`.

    Args:
        prompting: one of `PROMPTINGS`.
        code_head: made for this core.

    Raises:
        ValueError: the action head needs something of the codes that their decoding does not give.
    """
    action_head = None
    if config.action_head is not None:
        if isinstance(code_head, CodeTokenHead):
            _check_decoding(config.decoding, config.action_head)
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


def _check_decoding(decoding: str, head: ActionHeadConfig) -> None:
    expect(
        head.code_conditioning == "none" or decoding != "free",
        "decoding",
        f"'constrained' or 'generate' with an action head that is conditioned on codes ('{head.kind}')",
        "'free', whose codes may fail to parse",
        "decoding=constrained.",
    )
    expect(
        head.code_conditioning != "soft" or decoding == "constrained",
        "code_conditioning=soft",
        "decoding='constrained', which gives logits",
        repr(decoding),
        "decoding=constrained, or code_conditioning=tokens.",
    )
