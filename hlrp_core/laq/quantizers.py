"""Quantisers of vector-quantize-pytorch behind one interface: latents in, code vectors, codes and a loss out.

All of them compute in float32. Three traps of the library are dealt with here: replacing dead codes is off unless
`threshold_ema_dead_code` is set, FSQ with a level of 2 needs `preserve_symmetry`, and a codebook that several processes
learn needs `sync_codebook`, which is settled when it is made.

Shape legend: B batch, S code positions, D width of a code vector, K codebook size, Z width of the encoder's latents.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualFSQ, VectorQuantize

from hlrp_core.expectation import expect
from hlrp_core.laq.config import LAQConfig, fsq_levels

# A normal variable times this, through the tanh of the library, is spread nearly evenly.
_EVEN_SPREAD = 1.7


@dataclass(frozen=True)
class Quantized:
    """Args:
    condition: `[B, C]` what the decoder sees, with a gradient to the latents.
    codes: `[B, S]` long.
    loss: the quantiser's own scalar loss (0 for finite scalar quantisation).
    """

    condition: Tensor
    codes: Tensor
    loss: Tensor


class CodeQuantizer(nn.Module, abc.ABC):
    """What every quantiser is.

    Args:
        config: names the sizes.
    """

    latent_dim: int  # Z
    vector_dim: int  # D
    condition_dim: int  # C

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.code_seq_len = config.code_seq_len

    def forward(self, latents: Tensor, *, hardness: float = 1.0) -> Quantized:
        """Quantise `[B, Z]`.

        Args:
            hardness: 1 quantises; below, finite scalar quantisation hands on a blend with the unquantised latents,
                which eases early training.
        """
        with torch.autocast(latents.device.type, enabled=False):
            return self._quantize(latents.float(), hardness)

    @abc.abstractmethod
    def _quantize(self, latents: Tensor, hardness: float) -> Quantized: ...

    @abc.abstractmethod
    def vectors(self, codes: Tensor) -> Tensor:
        """Code vectors `[B, S, D]` of codes `[B, S]`."""

    def condition(self, codes: Tensor) -> Tensor:
        """What the decoder sees of codes `[B, S]`: `[B, C]`."""
        return self.vectors(codes).flatten(1)

    @abc.abstractmethod
    def calibrate(self, latents: Tensor) -> None:
        """Measure anew, on all of the latents `[N, Z]` at once, what codes go by and no gradient teaches; what was
        learnt stays."""

    def sync_across_processes(self) -> None:
        """Learn from what all processes quantise, equally in each of them. Before the optimizer and the first batch."""


class ScalarQuantizer(CodeQuantizer):
    """Finite scalar quantisation, `depth` positions of which refine one another.

    With depth 2 and S = 4, positions 1 and 2 each quantise latents of their own, and positions 3 and 4 what those two
    have left over.
    """

    def __init__(self, config: LAQConfig):
        super().__init__(config)
        levels = fsq_levels(config.codebook_size)
        self.depth, self.num_groups = config.fsq_depth, config.code_seq_len // config.fsq_depth
        self.vector_dim = len(levels)
        self.latent_dim = self.condition_dim = self.num_groups * len(levels)
        self.inner = ResidualFSQ(levels=levels, num_quantizers=self.depth)
        # Latents that start off-centre would all fall on one side of a level and stay there.
        self.centre = nn.BatchNorm1d(self.latent_dim, affine=False)

    def _quantize(self, latents: Tensor, hardness: float) -> Quantized:
        latents = _EVEN_SPREAD * self.centre(latents)
        _, codes = self.inner(latents.view(len(latents), self.num_groups, -1))  # (B, groups, depth)
        codes = codes.transpose(1, 2).flatten(1).long()  # coarse codes of all groups first
        limit: Tensor = self.inner.soft_clamp_input_value.repeat(self.num_groups)  # type: ignore[operator, assignment]
        soft = limit * torch.tanh(latents / limit)
        condition = soft + hardness * (self.condition(codes) - soft).detach()  # straight through
        return Quantized(condition, codes, latents.new_zeros(()))

    def vectors(self, codes: Tensor) -> Tensor:
        by_group = codes.view(len(codes), self.depth, self.num_groups).transpose(1, 2)
        return self.inner.get_codes_from_indices(by_group).transpose(0, 1).flatten(1, 2)  # (B, depth * groups, D)

    def condition(self, codes: Tensor) -> Tensor:
        return self.vectors(codes).view(len(codes), self.depth, -1).sum(1)

    def calibrate(self, latents: Tensor) -> None:
        """Raises:
        ValueError: fewer than two latents, which have no spread.
        """
        expect(
            len(latents) > 1,
            "calibration",
            "2 transitions or more, whose spread FSQ goes by",
            len(latents),
            "Give more pairs of frames.",
        )
        mean, variance = self.centre.running_mean, self.centre.running_var
        assert mean is not None and variance is not None
        mean.copy_(latents.mean(0))
        variance.copy_(latents.var(0))


class LearntCodebook(CodeQuantizer):
    """A codebook that all positions share, learnt by moving averages or by gradient."""

    def __init__(self, config: LAQConfig):
        super().__init__(config)
        self.vector_dim = config.code_dim
        self.latent_dim = self.condition_dim = config.code_seq_len * config.code_dim
        self.codebook_size = config.codebook_size
        self.learns_by_gradient = config.quantizer == "diveq"
        self.inner = self._make(sync_codebook=False)

    def _make(self, *, sync_codebook: bool) -> VectorQuantize:
        return VectorQuantize(
            dim=self.vector_dim,
            codebook_size=self.codebook_size,
            threshold_ema_dead_code=2,
            kmeans_init=True,
            sync_codebook=sync_codebook,
            directional_reparam=self.learns_by_gradient,
            rotation_trick=not self.learns_by_gradient,
        )

    def _quantize(self, latents: Tensor, hardness: float) -> Quantized:
        vectors, codes, loss = self.inner(latents.view(len(latents), self.code_seq_len, -1))
        return Quantized(vectors.flatten(1), codes.long(), loss.sum())

    def vectors(self, codes: Tensor) -> Tensor:
        return self.inner.get_codes_from_indices(codes)

    def calibrate(self, latents: Tensor) -> None:
        """A learnt codebook has no statistics to measure, and must not move: the decoder was trained with this one.
        Only one that was never trained takes its entries from the latents."""
        if not self.inner._codebook.initted:
            self.train()(latents)

    def sync_across_processes(self) -> None:
        learnt = self.inner.state_dict()
        self.inner = self._make(sync_codebook=True)
        self.inner.load_state_dict(learnt)


def make_quantizer(config: LAQConfig) -> CodeQuantizer:
    """The quantiser that `config.quantizer` names."""
    return ScalarQuantizer(config) if config.quantizer == "fsq" else LearntCodebook(config)
