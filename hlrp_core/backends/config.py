"""One config for a composed backend: which parts, and their settings. Travels with the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.expectation import expect, expect_choice
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.prompting.prompt import PromptConfig

CodeObjective = Literal["completion", "codes_only", "restricted"]
CodeSource = Literal["predicted", "teacher"]
Decoding = Literal["constrained", "generate", "free"]
LatentPooling = Literal["mean", "last", "query"]
TrainVocabulary = Literal["all", "code_rows"]
VectorObjective = Literal["regression", "flow"]


@dataclass
class BackendConfig:
    """Args:
    name: the registry's name of the composition.
    codebook_size: K.
    code_seq_len: S.
    image_size: pixels along a square image's side, as the backbone sees it; None keeps the processor's settings.
    image_splitting: an image in several tiles of `image_size`, where the backbone's family can (SmolVLM).
    prompt: what stands around image and instruction.
    token_scheme: how codes are written (token backends).
    decoding: `constrained`, `generate` or `free` (token backends).
    code_objective: what the loss on codes is a mean of (token backends): the whole `completion`, as a language model
        learns it, `codes_only`, or `restricted` to the K code rows at the code positions.
    latent_pooling: how the prompt's hidden states are summed up (latent-head backends, and vector backends by
        regression): their `mean`, the `last` one, or a learned `query` for each code position.
    train_vocabulary: what is trained of the embedding table and the vocabulary projection: `all` of them, or the
        `code_rows` alone, those of the code tokens and their wrapper (token backends).
    vector_objective: how vectors are learned (vector backends): by `regression` of the mean of all answers, or as a
        `flow` from noise that draws one of them.
    code_vector_dim: width of the LAQ's code vectors, in vector backends; None in those that predict codes.
    action_head: None for a backend that predicts codes alone.
    code_source: codes that a code-conditioned action head trains on: those it will see (`predicted`), or the
        labels (`teacher`).
    codes_loss_weight, actions_loss_weight: of the two losses in multitask mode.
    freeze_vision, freeze_backbone: parts that no mode trains. `freeze_backbone` covers the vision tower, and
        not the rows of `train_vocabulary=code_rows`.
    """

    name: str = "qwen_chat"
    codebook_size: int = 8
    code_seq_len: int = 4
    image_size: int | None = None
    image_splitting: bool = False
    prompt: PromptConfig = field(default_factory=PromptConfig)
    token_scheme: TokenSchemeConfig = field(default_factory=TokenSchemeConfig)
    decoding: Decoding = "constrained"
    code_objective: CodeObjective = "completion"
    latent_pooling: LatentPooling = "mean"
    train_vocabulary: TrainVocabulary = "all"
    vector_objective: VectorObjective = "regression"
    code_vector_dim: int | None = None
    action_head: ActionHeadConfig | None = None
    code_source: CodeSource = "predicted"
    codes_loss_weight: float = 1.0
    actions_loss_weight: float = 1.0
    freeze_vision: bool = False
    freeze_backbone: bool = False

    def __post_init__(self) -> None:
        for name, least in (("codebook_size", 2), ("code_seq_len", 1)):
            expect(getattr(self, name) >= least, name, f"{least} or more", getattr(self, name), "raise it.")
        for name in ("codes_loss_weight", "actions_loss_weight"):
            expect(getattr(self, name) >= 0, name, "0 or more", getattr(self, name), "raise it; 0 leaves the loss out.")
        choices = {
            "decoding": Decoding,
            "code_source": CodeSource,
            "latent_pooling": LatentPooling,
            "code_objective": CodeObjective,
            "train_vocabulary": TrainVocabulary,
            "vector_objective": VectorObjective,
        }
        for name, known in choices.items():
            expect_choice(name, getattr(self, name), get_args(known))
        if self.decoding == "free" and self.code_objective != "completion":
            raise ValueError(
                f"decoding: expected 'constrained' or 'generate' with code_objective={self.code_objective!r}, which "
                "does not teach the tokens around the codes, got 'free'. Next step: decoding=constrained."
            )
        if self.action_head is not None and self.action_head.code_conditioning != "none":
            self._check_vectors(self.action_head)

    def _check_vectors(self, head: ActionHeadConfig) -> None:
        """A head is conditioned on vectors exactly where vectors are predicted: they are never quantised."""
        predicts_vectors = self.code_vector_dim is not None
        if predicts_vectors != (head.code_conditioning == "vector"):
            expected = "'vector'" if predicts_vectors else "'tokens', 'soft' or 'none'"
            raise ValueError(
                f"code_conditioning of action head '{head.kind}': expected {expected} on backend '{self.name}', which "
                f"predicts {'vectors' if predicts_vectors else 'codes'}, got '{head.code_conditioning}'. "
                "Next step: choose one of these."
            )
        if predicts_vectors and head.code_vector_dim != self.code_vector_dim:
            raise ValueError(
                f"code_vector_dim of action head '{head.kind}': expected {self.code_vector_dim}, as the code head "
                f"predicts, got {head.code_vector_dim}. Next step: take the width of the LAQ's code vectors."
            )
