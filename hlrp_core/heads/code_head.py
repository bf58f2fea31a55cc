"""What every code head is: the part of a backend that learns and predicts latent actions.

Shape legend: B batch, L prompt tokens, W hidden width, S code positions, K codebook size, N completion tokens,
D width of a code vector.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.token_batch import TokenBatch
from hlrp_core.codes.accuracy import CodeCounts, code_accuracy
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.action_head import PrefixEncoding
from hlrp_core.prompting.strategy import PromptInputs


@dataclass(frozen=True)
class BackboneEncoding:
    """One run of the backbone over a batch.

    Args:
        prefix: hidden states of the prompt alone, as action heads and latent heads see them.
        prompt: the prompt's tokens.
        completion_hidden: `[B, N, W]` states from which each completion token is predicted; None without completion.
        cache: keys and values of the prompt (and completion), where they were asked for.
    """

    prefix: PrefixEncoding
    prompt: TokenBatch
    completion_hidden: Tensor | None = None
    cache: DynamicCache | None = None


@dataclass(frozen=True)
class CodeLoss:
    """Args:
    per_sample: `[B]`.
    predicted: `[B, S]` codes that the head would have predicted given the true ones before them.
    vector: `[B, S, D]`, where the head predicts vectors; `predicted` are the codes nearest to them.
    """

    per_sample: Tensor
    predicted: Tensor
    vector: Tensor | None = None

    def select(self, mask: Tensor) -> CodeLoss:
        """Of the samples in `mask` `[B]` alone."""
        vector = self.vector[mask] if self.vector is not None else None
        return CodeLoss(self.per_sample[mask], self.predicted[mask], vector)


class CodeHead(nn.Module, abc.ABC):
    """Learns codes from frame t and the instruction."""

    metric_names: ClassVar[tuple[str, ...]] = ("code_accuracy", "constant_accuracy")
    """What `measure` reports."""

    @abc.abstractmethod
    def completion(self, codes: Tensor) -> Tensor | None:
        """Ids `[B, N]` to append to the prompt in training; None where the head reads the prompt alone."""

    @abc.abstractmethod
    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss: ...

    def measure(self, result: CodeLoss, codes: Tensor, counts: CodeCounts) -> dict[str, float]:
        """How good the predictions of labelled samples are, beside a constant prediction.

        Args:
            result: of these samples.
            codes: `[B, S]`, their labels.
            counts: of the codes in training so far.
        """
        return {
            "code_accuracy": code_accuracy(result.predicted, codes),
            "constant_accuracy": counts.constant_accuracy(),
        }

    @abc.abstractmethod
    def log_prob(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> Tensor:
        """Log-probability `[B]` float32 of drawing `codes` `[B, S]` at temperature 1, with its gradient.

        Args:
            encoding: of the prompt, and of `completion(codes)` behind it where the head has one.

        Raises:
            ValueError: the head gives codes no probability.
        """

    @abc.abstractmethod
    def predict(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        """Codes or vectors of left-padded prompts.

        Args:
            encoding: where given, it is of these prompts with a cache, and is used up.
        """


def read_prefix(core: ModelCore, inputs: PromptInputs, encoding: BackboneEncoding | None) -> PrefixEncoding:
    """The prompt's hidden states: those of `encoding`, or of a run of the core where there is none."""
    if encoding is not None:
        return encoding.prefix
    hidden, _ = core(inputs.tokens, inputs.images)
    return PrefixEncoding(hidden, inputs.tokens.valid_mask)


def sum_code_log_probs(logits: Tensor, codes: Tensor) -> Tensor:
    """Log-probability `[B]` float32 of codes `[B, S]` that were drawn from logits `[B, S, K]`."""
    log_probs = F.log_softmax(logits.float(), dim=-1)
    return log_probs.gather(2, codes[..., None])[..., 0].sum(1)
