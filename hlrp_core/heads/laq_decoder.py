"""`laq`: action chunks by direct regression from the LAQ's own code vectors and the state.

What a code means is given by the LAQ's geometry and not learnt anew: near codes lie near each other, and where vectors
add up over positions (residual codes), so do the expected ones. The vectors are saved with the head, so that the LAQ
itself is not needed again.

Shape legend: B batch, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

from torch import nn

from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.action_head import ContextSizes
from hlrp_core.heads.code_vectors import CodeVectors
from hlrp_core.heads.mlp import MLPHead


class LAQDecoderHead(MLPHead):
    """A residual MLP on the LAQ's code vectors and the state, trained with L1 as `mlp` is.

    With `code_conditioning=vector` a code head predicts these vectors, and they are taken as they come. Otherwise codes
    are looked up in a table of the head's own, which is whole after `hand_over_code_vectors` or after loading its
    weights; before, its vectors are NaN and so is all it predicts.

    Trained on teacher codes (`code_source=teacher`) it is a decoder of the LAQ's actions that knows no backbone.

    Raises:
        ValueError: `config.code_vector_dim` is missing.
    """

    needs_code_vectors = True

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        if config.code_vector_dim is None:
            raise ValueError(
                f"code_vector_dim of action head '{config.kind}': expected the width of the LAQ's code vectors, got "
                "None. Next step: set it to laq.code_vector_table().shape[-1]."
            )
        super().__init__(config, sizes)

    def _build_codes(self) -> tuple[nn.Module, int]:
        dim = self.config.code_vector_dim
        assert dim is not None  # checked above
        if self.config.code_conditioning == "vector":
            return nn.Identity(), dim
        owner = f"action head '{self.config.kind}'"
        return CodeVectors(self.sizes.codebook_size, self.sizes.code_seq_len, dim, owner=owner), dim
