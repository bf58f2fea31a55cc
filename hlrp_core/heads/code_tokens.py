"""Codes as tokens of the language model: completion loss and prediction.

The loss is the language model's cross entropy on the completion, identical to the full `[B, L, V]` computation with
-100 on the prompt; but the vocabulary projection runs only where a label is.

Shape legend: B batch, N completion tokens, W hidden width, V vocabulary rows, S code positions, K codebook size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.codes.decoding import CodeDecoder
from hlrp_core.codes.token_scheme import CodeVocabulary
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead, CodeLoss, sum_code_log_probs
from hlrp_core.heads.linear_cross_entropy import linear_cross_entropy
from hlrp_core.prompting.strategy import PromptInputs


class CodeTokenHead(CodeHead):
    """Predicts codes as a text completion. Has no parameters of its own: the language model is the head.

    Args:
        objective: of the training loss. `completion`: the language model's own, the mean over all N tokens of the
            completion. `codes_only`: the mean over the S code positions; wrapper and separators are never learnt.
            `restricted`: so, too, and a softmax over the K code rows instead of all V, as `constrained` decodes.
    """

    def __init__(self, vocabulary: CodeVocabulary, decoder: CodeDecoder, *, objective: str = "completion"):
        super().__init__()
        self.vocabulary = vocabulary
        self.decoder = decoder
        self.objective = objective

    def completion(self, codes: Tensor) -> Tensor:
        return self.vocabulary.encode(codes)

    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss:
        hidden = encoding.completion_hidden
        assert hidden is not None
        if self.objective == "restricted":
            logits = self._code_logits(core, hidden).float()  # (B, S, K)
            per_code = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (B, S)
            return CodeLoss(per_code.mean(1), logits.detach().argmax(-1))
        with torch.no_grad():
            predicted = self._code_logits(core, hidden).argmax(-1)  # (B, S)
        labels = self.vocabulary.encode(codes)  # (B, N)
        if self.objective == "codes_only":
            slots = self.vocabulary.code_slots.to(hidden.device)
            hidden, labels = hidden[:, slots], labels[:, slots]
        per_token = _vocabulary_loss(core, hidden.flatten(0, 1), labels.flatten())  # (B * N)
        return CodeLoss(per_token.view_as(labels).mean(1), predicted)

    def log_prob(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> Tensor:
        """Over the K code rows alone at each code position, as `constrained` draws: wrapper and separators are certain.

        Not minus `loss`, which is the mean over all N tokens and over the whole vocabulary.
        """
        assert encoding.completion_hidden is not None
        return sum_code_log_probs(self._code_logits(core, encoding.completion_hidden), codes)

    def _code_logits(self, core: ModelCore, hidden: Tensor) -> Tensor:
        """Logits `[B, S, K]` of the codes, from states `[B, N, W]` of a completion."""
        at_codes = hidden[:, self.vocabulary.code_slots.to(hidden.device)]  # (B, S, W)
        rows = core.projection_rows(self.vocabulary.code_ids.to(hidden.device))  # (K, W)
        return at_codes.to(rows.dtype) @ rows.T

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


def _vocabulary_loss(core: ModelCore, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy `[M]` of states `[M, W]` over all V tokens; the prompt's positions are never among them."""
    weight = core.projection_weight
    if core.code_rows is None:
        return linear_cross_entropy(hidden, weight, labels)
    rows, first_row = core.code_rows("projection"), core.code_rows.span.start
    return linear_cross_entropy(hidden, weight, labels, rows=rows, first_row=first_row)
