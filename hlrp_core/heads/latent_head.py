"""Codes by a small head on the prompt's hidden states, all positions at once: nothing is written or decoded.

Shape legend: B batch, S code positions, K codebook size, W hidden width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.codes.decoding import pick_codes
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead, CodeLoss, read_prefix, sum_code_log_probs
from hlrp_core.heads.pooled_readout import PooledReadout
from hlrp_core.prompting.strategy import PromptInputs


class LatentHead(PooledReadout, CodeHead):
    """Logits `[B, S, K]` from a prefix; codes are their best entries.

    Args:
        hidden_dim: W.
        codebook_size: K.
        code_seq_len: S.
        pooling: of `PooledReadout`.
    """

    def __init__(self, hidden_dim: int, *, codebook_size: int, code_seq_len: int, pooling: str = "mean"):
        super().__init__(hidden_dim, code_seq_len=code_seq_len, output_dim=codebook_size, pooling=pooling)

    def completion(self, codes: Tensor) -> None:
        return None

    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss:
        logits = self(encoding.prefix)
        per_code = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")  # (B, S)
        return CodeLoss(per_code.mean(1), logits.detach().argmax(-1))

    def log_prob(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> Tensor:
        """The code positions are independent given the prompt."""
        return sum_code_log_probs(self(encoding.prefix), codes)

    def predict(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        logits = self(read_prefix(core, inputs, encoding))
        codes = pick_codes(logits.flatten(0, 1), sampling).unflatten(0, logits.shape[:2])  # (B, S)
        return LatentOutput(logits=logits, tokens=codes)
