"""`laq`: action chunks by direct regression from the LAQ's own code vectors and the state.

What a code means is given by the LAQ's geometry and not learnt anew: near codes lie near each other, and where vectors
add up over positions (residual codes), so do the expected ones. The vectors are saved with the head, so that the LAQ
itself is not needed again.

Shape legend: B batch, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

from torch import Tensor

from hlrp_core.heads.action_head import ActionHead, ActionHeadConfig, ContextSizes
from hlrp_core.heads.layers import CodeVectors
from hlrp_core.heads.mlp import MLPHead


class LAQDecoderHead(MLPHead):
    """A residual MLP on the LAQ's code vectors and the state, trained with L1 as `mlp` is.

    Whole after `set_code_vectors`, or after loading its weights; before, its vectors are NaN and so is all it predicts.
    Trained on teacher codes (`code_source=teacher`) it is a decoder of the LAQ's actions that knows no backbone.

    Raises:
        ValueError: `config.code_vector_dim` is missing.
    """

    needs_code_vectors = True
    codes: CodeVectors

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        if config.code_vector_dim is None:
            raise ValueError(
                f"code_vector_dim of action head '{config.kind}': expected the width of the LAQ's code vectors, got "
                "None. Next step: set it to laq.code_vector_table().shape[-1]."
            )
        super().__init__(config, sizes)

    def _build_codes(self) -> CodeVectors:
        assert self.config.code_vector_dim is not None  # checked above
        return CodeVectors(self.sizes.codebook_size, self.sizes.code_seq_len, self.config.code_vector_dim)

    def set_code_vectors(self, vectors: Tensor) -> None:
        """Take over `LatentActionQuantizer.code_vector_table()`, `[S, K, D]`.

        Raises:
            ValueError: another shape.
        """
        expected = tuple(self.codes.vectors.shape)
        if vectors.shape != expected:
            raise ValueError(
                f"code vectors of action head '{self.config.kind}': expected {list(expected)} (S, K, D), got "
                f"{list(vectors.shape)}. Next step: take those of the LAQ that made the codes."
            )
        self.codes.vectors.copy_(vectors.detach())


def hand_over_code_vectors(head: ActionHead | None, vectors: Tensor | None) -> None:
    """Give a new head the LAQ's code vectors `[S, K, D]`, if it decodes them.

    Raises:
        ValueError: there are none for a head that decodes them, some for a head that does not, or they do not fit it.
    """
    if isinstance(head, LAQDecoderHead):
        if vectors is None:
            raise ValueError(
                f"code vectors of action head '{head.config.kind}': expected those of the LAQ that made the codes, "
                "got None. Next step: pass code_vectors=laq.code_vector_table()."
            )
        head.set_code_vectors(vectors)
    elif vectors is not None:
        kind = "none" if head is None else f"'{head.config.kind}'"
        raise ValueError(
            f"code vectors: expected an action head that decodes them ('laq'), got {kind}. "
            "Next step: leave them out, or choose the head 'laq'."
        )
