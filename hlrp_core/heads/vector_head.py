"""Continuous latents: the LAQ's code vectors themselves, predicted from the prompt's hidden states.

Nothing is quantised: a prediction may lie between two codes. The target is the vector of each label's code,
standardised (`CodeVectors`), so that errors count as they lie in the LAQ; what is predicted is in the LAQ's own units.

Shape legend: B batch, W hidden width, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import LatentOutput, SamplingOptions
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.action_head import ActionContext, ContextSizes, PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead, CodeLoss, read_prefix
from hlrp_core.heads.code_vectors import CodeVectors
from hlrp_core.heads.pooled_readout import PooledReadout
from hlrp_core.heads.prefix_flow import PrefixFlowHead
from hlrp_core.prompting.strategy import PromptInputs


class VectorHead(CodeHead):
    """Vectors `[B, S, D]` from a prefix. Whole once its `table` is set or loaded; before, all it predicts is NaN.

    Args:
        codebook_size: K.
        code_seq_len: S.
        code_vector_dim: D.
    """

    metric_names = (*CodeHead.metric_names, "vector_loss", "constant_vector_loss")

    def __init__(self, *, codebook_size: int, code_seq_len: int, code_vector_dim: int):
        super().__init__()
        self.table = CodeVectors(codebook_size, code_seq_len, code_vector_dim, owner="the vector head")

    @abc.abstractmethod
    def learn(self, prefix: PrefixEncoding, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss `[B]` of predicting `target` `[B, S, D]`, and the expected answer `[B, S, D]`; standardised."""

    @abc.abstractmethod
    def answer(self, prefix: PrefixEncoding, sampling: SamplingOptions) -> Tensor:
        """The prediction `[B, S, D]`, standardised."""

    def completion(self, codes: Tensor) -> None:
        return None

    def loss(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> CodeLoss:
        per_sample, expected = self.learn(encoding.prefix, self.table.lookup(codes))
        return CodeLoss(per_sample, self.table.nearest(expected), expected)

    def measure(self, result: CodeLoss, codes: Tensor, counts: CodeCounts) -> dict[str, float]:
        """Beside the accuracy of the nearest codes: the squared error of the vectors, and of their constant mean."""
        assert result.vector is not None
        target = self.table.lookup(codes)
        constant = self.table.mean_vectors(counts.counts.to(target.device))
        return {
            **super().measure(result, codes, counts),
            "vector_loss": (result.vector - target).square().mean().item(),
            "constant_vector_loss": (constant - target).square().mean().item(),
        }

    def log_prob(self, core: ModelCore, encoding: BackboneEncoding, codes: Tensor) -> Tensor:
        raise ValueError(
            "latent_log_prob: expected a backend that predicts codes, got one that predicts vectors, in which codes "
            "have no probability. Next step: use a backend with tokens or a latent head."
        )

    def predict(
        self,
        core: ModelCore,
        inputs: PromptInputs,
        sampling: SamplingOptions,
        *,
        encoding: BackboneEncoding | None = None,
    ) -> LatentOutput:
        answer = self.answer(read_prefix(core, inputs, encoding), sampling)
        return LatentOutput(vector=self.table.restore(answer).contiguous())


class VectorRegressionHead(VectorHead):
    """By squared error: the mean of all answers, one pass.

    Args:
        hidden_dim: W.
        pooling: of `PooledReadout`.
        sizes: of `VectorHead`.
    """

    def __init__(self, hidden_dim: int, *, pooling: str, **sizes: int):
        super().__init__(**sizes)
        self.readout = PooledReadout(
            hidden_dim, code_seq_len=sizes["code_seq_len"], output_dim=self.table.dim, pooling=pooling
        )
        with torch.no_grad():
            self.readout.weight.mul_(0.1)  # begins near the mean vector

    def learn(self, prefix: PrefixEncoding, target: Tensor) -> tuple[Tensor, Tensor]:
        vector = self.readout(prefix)
        return (vector - target).square().mean((1, 2)), vector.detach()

    def answer(self, prefix: PrefixEncoding, sampling: SamplingOptions) -> Tensor:
        return self.readout(prefix)


class VectorFlowHead(VectorHead):
    """By flow matching: draws one of several answers. The expert of `prefix_flow`, over S vectors instead of C actions.

    Computed in float32 under autocast too: it is small.

    Args:
        hidden_dim: W.
        sizes: of `VectorHead`.
    """

    def __init__(self, hidden_dim: int, **sizes: int):
        super().__init__(**sizes)
        config = ActionHeadConfig(
            kind="prefix_flow",
            chunk_size=sizes["code_seq_len"],
            action_dim=self.table.dim,
            hidden_dim=_EXPERT_WIDTH,
            num_layers=_EXPERT_LAYERS,
            num_noise_draws=_NOISE_DRAWS,
        )
        self.flow = PrefixFlowHead(config, ContextSizes(hidden_dim, sizes["codebook_size"], sizes["code_seq_len"]))

    def learn(self, prefix: PrefixEncoding, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(target.device.type, enabled=False):
            context = _context(prefix)
            per_sample = self.flow.per_sample_loss(context, target, None)
            with torch.no_grad():
                # At t = 1 the path says nothing of the data yet, so that noise - velocity is the mean of all answers:
                # what a regression predicts. Read at noise 0, the middle of all noise, it has no chance in it.
                noise = torch.zeros_like(target)
                expected = noise - self.flow.velocity(context, noise, target.new_ones(len(target)))
        return per_sample, expected

    def answer(self, prefix: PrefixEncoding, sampling: SamplingOptions) -> Tensor:
        # starting noise and real-time chunking are of the action chunk
        own = SamplingOptions(generator=sampling.generator, num_flow_steps=sampling.num_flow_steps)
        with torch.autocast(prefix.hidden.device.type, enabled=False):
            return self.flow.predict(_context(prefix), own)


# S vectors of D numbers are little to draw, and further draws of noise share one encoding of the prefix.
_EXPERT_WIDTH, _EXPERT_LAYERS, _NOISE_DRAWS = 256, 2, 4


def _context(prefix: PrefixEncoding) -> ActionContext:
    return ActionContext(prefix=PrefixEncoding(prefix.hidden.float(), prefix.valid_mask))
