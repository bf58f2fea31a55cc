"""From a prompt to codes: three named ways.

`constrained` runs over the key-value cache: wrapper and separator tokens are forced, so they ride in the prefill or
with the code before them, and every step projects onto the K code rows alone. `generate` is Hugging Face's `generate`
with allowed tokens: the slow reference whose greedy codes `constrained` must equal. `free` lets the model write
what it likes and reports what does not parse.

All of them expect left-padded prompts: `generate` on a right-padded batch is wrong.

Shape legend: B batch, S code positions, K codebook size, W hidden width.
"""

from __future__ import annotations

import abc
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.token_batch import TokenBatch
from hlrp_core.codes.token_scheme import CodeVocabulary
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.prompting.strategy import PromptInputs

if TYPE_CHECKING:
    from hlrp_core.heads.code_head import BackboneEncoding


class CodeDecoder(abc.ABC):
    """Predicts codes of prompts.

    Args:
        vocabulary: the code tokens.
    """

    def __init__(self, vocabulary: CodeVocabulary):
        self.vocabulary = vocabulary

    @abc.abstractmethod
    def decode(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput: ...


class ConstrainedDecoder(CodeDecoder):
    """Prefill, then one forward for each further code: `[code, separator]`, read on K rows."""

    def decode(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        size = inputs.tokens.ids.shape[0]
        device = inputs.tokens.ids.device
        forced = self.vocabulary.forced_prefix.to(device).expand(size, -1)
        if encoding is None or encoding.cache is None:  # under gradient checkpointing transformers keeps no cache
            tokens = inputs.tokens.append(forced)
            hidden, cache = core(tokens, inputs.images, use_cache=True)
        else:
            tokens = inputs.tokens.continuation(forced)
            hidden, cache = core(tokens, cache=encoding.cache)

        code_ids = self.vocabulary.code_ids.to(device)
        rows = core.projection_rows(code_ids)  # (K, W): gathered once for all steps
        separator = torch.tensor(self.vocabulary.separator_ids, dtype=torch.long, device=device).expand(size, -1)
        logits, codes = [], []
        for position in range(self.vocabulary.code_seq_len):
            logits.append(hidden[:, -1] @ rows.T)  # (B, K)
            codes.append(pick_codes(logits[-1], sampling))
            if position + 1 < self.vocabulary.code_seq_len:
                step = torch.cat([code_ids[codes[-1]][:, None], separator], dim=1)  # (B, 1 + separator)
                tokens = tokens.continuation(step)
                hidden, cache = core(tokens, cache=cache)
        return LatentOutput(logits=torch.stack(logits, 1).float(), tokens=torch.stack(codes, 1))


def pick_codes(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """Codes `[B]` from logits `[B, K]`: the best one, or drawn at a temperature."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.generator is None or sampling.generator.device == probabilities.device:
        return torch.multinomial(probabilities, 1, generator=sampling.generator)[:, 0]
    draw = torch.multinomial(probabilities.to(sampling.generator.device), 1, generator=sampling.generator)
    return draw[:, 0].to(logits.device)


class GenerateDecoder(CodeDecoder):
    """Hugging Face `generate`, only completions of the scheme allowed."""

    def decode(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        prompt_len = inputs.tokens.ids.shape[1]
        code_ids = self.vocabulary.code_ids.tolist()
        allowed = [code_ids if token < 0 else [token] for token in self.vocabulary.template.tolist()]

        def allow(_: int, ids: Tensor) -> list[int]:
            return allowed[min(len(ids) - prompt_len, len(allowed) - 1)]

        written = generate_ids(core, inputs, self.vocabulary, sampling, prefix_allowed_tokens_fn=allow)
        codes = [self.vocabulary.decode(row) for row in written.tolist()]
        assert all(row is not None for row in codes), "generate left the allowed tokens"
        return LatentOutput(tokens=torch.tensor(codes, device=inputs.tokens.ids.device))


class FreeDecoder(CodeDecoder):
    """Hugging Face `generate` without constraint; what does not parse is -1, and its text is in `meta`."""

    def decode(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        written = generate_ids(core, inputs, self.vocabulary, sampling).tolist()
        codes, unparsed = [], {}
        for row, ids in enumerate(written):
            parsed = self.vocabulary.decode(ids)
            codes.append(parsed or [-1] * self.vocabulary.code_seq_len)
            if parsed is None:
                unparsed[row] = core.tokenizer.decode(ids)
        return LatentOutput(tokens=torch.tensor(codes, device=inputs.tokens.ids.device), meta={"unparsed": unparsed})


def generate_ids(
    core: ModelCore,
    inputs: PromptInputs,
    vocabulary: CodeVocabulary,
    sampling: SamplingOptions,
    **kwargs: Any,
) -> Tensor:
    """New ids `[B, N]`, at most one completion long."""
    if sampling.generator is not None and sampling.temperature > 0:  # greedy codes take nothing from it
        raise ValueError(
            "decoding: expected no generator with Hugging Face `generate` and a temperature, got one. Next step: use "
            "decoding=constrained, or seed torch's global generator."
        )
    _expect_left_padding(inputs.tokens)
    draw = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=vocabulary.completion_len,
        eos_token_id=vocabulary.end_id,
        pad_token_id=core.tokenizer.pad_token_id,
        **(draw if sampling.temperature > 0 else {"do_sample": False}),
    )
    return core.generate(inputs.tokens, inputs.images, settings, **kwargs)


def _expect_left_padding(tokens: TokenBatch) -> None:
    assert tokens.padding_side == "left" or not tokens.is_padded, "prediction needs left-padded prompts"


DECODERS: dict[str, type[CodeDecoder]] = {
    "constrained": ConstrainedDecoder,
    "generate": GenerateDecoder,
    "free": FreeDecoder,
}


def make_decoder(name: str, vocabulary: CodeVocabulary) -> CodeDecoder:
    """Raises:
    ValueError: no such decoding; the closest name is offered.
    """
    if name not in DECODERS:
        close = get_close_matches(name, DECODERS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise ValueError(
            f"decoding: expected one of {', '.join(DECODERS)}, got {name!r}.{hint} Next step: choose one of these; "
            "constrained is the fast one."
        )
    return DECODERS[name](vocabulary)
