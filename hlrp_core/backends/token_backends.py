"""Backends that write codes as tokens: any core, any prompting."""

from __future__ import annotations

import logging

from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.composition import check_decoding, compose_backend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.codes.token_scheme import CodeVocabulary, add_code_tokens
from hlrp_core.heads.code_tokens import CodeTokenHead

logger = logging.getLogger(__name__)


def compose_token_backend(config: BackendConfig, core: ModelCore, *, prompting: str, is_new: bool) -> ComposedBackend:
    """Add the code tokens to the core, and compose it with a prompting strategy and the heads.

    A backbone that already holds the tokens, such as one that was trained on codes before, keeps their rows.

    Raises:
        ValueError: the action head needs something of the codes that their decoding does not give.
    """
    check_decoding(config)
    num_added = add_code_tokens(core.tokenizer, config.token_scheme, config.codebook_size)
    vocabulary = CodeVocabulary(core.tokenizer, config.token_scheme, config.codebook_size, config.code_seq_len)
    if is_new:
        new_ids = vocabulary.ids if num_added else _ids_without_row(core, vocabulary)
        core.grow_vocabulary(num_old=int(vocabulary.ids.min()), new_ids=new_ids)
    if config.train_vocabulary == "code_rows":
        core.train_code_rows(vocabulary.ids)
    decoder = make_decoder(config.decoding, vocabulary)
    head = CodeTokenHead(vocabulary, decoder, objective=config.code_objective)
    return compose_backend(config, core, prompting=prompting, code_head=head)


def _ids_without_row(core: ModelCore, vocabulary: CodeVocabulary) -> Tensor:
    """Of code tokens that the backbone's tokenizer came with: those that its tables end before."""
    logger.info(
        "The backbone's tokenizer already holds the %d code tokens (%s, ...): their rows stay as they are.",
        len(vocabulary.ids),
        core.tokenizer.convert_ids_to_tokens(vocabulary.begin_id),
    )
    return vocabulary.ids[vocabulary.ids >= core.lm_head.weight.shape[0]]
