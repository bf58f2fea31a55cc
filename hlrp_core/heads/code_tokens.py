"""Codes as tokens of the language model: completion loss and prediction.

The loss is the language model's cross entropy on the completion, identical to the full `[B, L, V]` computation with
-100 on the prompt; but the vocabulary projection runs only where a label is.

Shape legend: B batch, N completion tokens, W hidden width, V vocabulary rows, S code positions, K codebook size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.codes.decoding import CodeDecoder
from hlrp_core.codes.token_scheme import CodeVocabulary
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead, CodeLoss
from hlrp_core.prompting.strategy import PromptInputs


class CodeTokenHead(CodeHead):
    """Predicts codes as a text completion. Has no parameters of its own: the language model is the head."""

    def __init__(self, vocabulary: CodeVocabulary, decoder: CodeDecoder):
        super().__init__()
        self.vocabulary = vocabulary
        self.decoder = decoder

    def completion(self, codes: Tensor) -> Tensor:
        return self.vocabulary.encode(codes)

    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss:
        assert encoding.completion_hidden is not None
        labels = self.vocabulary.encode(codes)  # (B, N)
        logits = core.lm_head(encoding.completion_hidden)  # (B, N, V): the prompt's positions are never projected
        per_token = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        at_codes = logits.detach()[:, self.vocabulary.code_slots.to(logits.device)]  # (B, S, V)
        predicted = at_codes[:, :, self.vocabulary.code_ids.to(logits.device)].argmax(-1)  # (B, S)
        return CodeLoss(per_token.view_as(labels).mean(1), predicted)

    def predict(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        core.check_length(inputs.tokens.ids.shape[1] + self.vocabulary.completion_len)
        return self.decoder.decode(core, inputs, sampling, encoding=encoding)
