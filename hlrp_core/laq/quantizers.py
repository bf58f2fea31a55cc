"""Quantisers of vector-quantize-pytorch behind one interface: latents in, code vectors, codes and a loss out.

All of them compute in float32. Two traps of the library are dealt with here: replacing dead codes is off unless
`threshold_ema_dead_code` is set, and FSQ with a level of 2 needs `preserve_symmetry`.

Shape legend: B batch, S code positions, D width of a code vector, K codebook size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

from hlrp_core.laq.config import LAQConfig, fsq_levels


class CodeQuantizer(nn.Module):
    """Quantises `[B, S, D]`.

    Args:
        config: names the quantiser and its sizes.
    """

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.is_fsq = config.quantizer == "fsq"
        if self.is_fsq:
            levels = fsq_levels(config.codebook_size)
            self.dim = len(levels)
            self.inner: nn.Module = FSQ(levels, preserve_symmetry=True)
            # Latents that start off-centre would all fall on one side of a level of 2 and stay there.
            self.centre = nn.BatchNorm1d(config.code_seq_len * self.dim, affine=False)
        else:
            self.dim = config.code_dim
            learns_by_gradient = config.quantizer == "diveq"
            self.inner = VectorQuantize(
                dim=self.dim,
                codebook_size=config.codebook_size,
                threshold_ema_dead_code=2,
                kmeans_init=True,
                sync_codebook=torch.distributed.is_available() and torch.distributed.is_initialized(),
                directional_reparam=learns_by_gradient,
                rotation_trick=not learns_by_gradient,
            )

    def forward(self, latents: Tensor, *, hardness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise `[B, S, D]`.

        Args:
            hardness: 1 quantises; below, FSQ hands on a blend with the unquantised latents, which eases early training.

        Returns:
            code vectors `[B, S, D]`, codes `[B, S]` long, and the quantiser's own scalar loss (0 for FSQ).
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if not self.is_fsq:
                vectors, codes, loss = self.inner(latents)
                return vectors, codes.long(), loss.sum()
            latents = self.centre(latents.flatten(1)).view_as(latents)
            vectors, codes = self.inner(latents)
            if hardness < 1:
                soft = torch.tanh(latents)
                vectors = soft + hardness * (vectors - soft)
            return vectors, codes.long(), latents.new_zeros(())

    def vectors(self, codes: Tensor) -> Tensor:
        """Code vectors `[B, S, D]` of codes `[B, S]`."""
        if self.is_fsq:
            return self.inner.indices_to_codes(codes)  # type: ignore[operator]
        return self.inner.get_codes_from_indices(codes)  # type: ignore[operator]
