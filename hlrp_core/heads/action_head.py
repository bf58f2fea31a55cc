"""What every action head is: the boundary between a backbone (or codes) and continuous actions.

Shape legend: B batch, L prefix tokens, W prefix width, S code positions, K codebook size, V width of a code
vector, D state width, C chunk length, A action width.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hlrp_core.contract import SamplingOptions
from hlrp_core.expectation import expect
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.layers import CodeEmbedding, VectorEmbedding


@dataclass(frozen=True)
class PrefixEncoding:
    """A backbone's view of frame t and the instruction.

    Args:
        hidden: `[B, L, W]`.
        valid_mask: `[B, L]` bool, False on padding.
    """

    hidden: Tensor
    valid_mask: Tensor


@dataclass(frozen=True)
class ActionContext:
    """Everything an action head may look at; a head takes what it was built for.

    Args:
        state: `[B, D]` float, normalised.
        code_probs: `[B, S, K]` float: one-hot codes (`tokens`) or their distribution (`soft`).
        prefix: the backbone's hidden states.
        code_vectors: `[B, S, V]` float: standardised code vectors (`vector`), instead of `code_probs`.
    """

    state: Tensor | None = None
    code_probs: Tensor | None = None
    prefix: PrefixEncoding | None = None
    code_vectors: Tensor | None = None


@dataclass(frozen=True)
class ContextSizes:
    """Sizes of an `ActionContext` that the backbone and the codes decide.

    Args:
        prefix_dim: W; None where the composition has no prefix for the head.
        codebook_size: K.
        code_seq_len: S.
    """

    prefix_dim: int | None
    codebook_size: int
    code_seq_len: int


class ActionHead(nn.Module, abc.ABC):
    """Turns an `ActionContext` into chunks of actions `[B, C, A]`, in the normalised space of the labels.

    Args:
        config: the head's settings.
        sizes: of what the head looks at.

    Raises:
        ValueError: the head needs codes or a prefix and was given none.
    """

    needs_prefix: ClassVar[bool]
    needs_code_vectors: ClassVar[bool] = False
    """Whether it decodes the LAQ's own code vectors, which `hand_over_code_vectors` hands to it once."""
    supports_guidance: ClassVar[bool]
    """Whether `predict` can be steered towards the chunk before it (real-time chunking)."""

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        super().__init__()
        expect(
            self.needs_prefix or config.code_conditioning != "none",
            f"code_conditioning of action head '{config.kind}'",
            "'tokens' or 'soft'",
            "'none'",
            "set code_conditioning ('vector' if vectors are predicted), or choose the head 'prefix_flow', which can do "
            "without codes.",
        )
        expect(
            not self.needs_prefix or sizes.prefix_dim is not None,
            f"prefix_dim of action head '{config.kind}'",
            "the width of the backbone's hidden states",
            None,
            "pass prefix_dim.",
        )
        expect(
            config.code_conditioning != "vector" or config.code_vector_dim is not None,
            f"code_vector_dim of action head '{config.kind}' with code_conditioning=vector",
            "the width of the LAQ's code vectors",
            None,
            "set it to laq.code_vector_table().shape[-1].",
        )
        self.config = config
        self.sizes = sizes

    @property
    def needs_codes(self) -> bool:
        return self.config.code_conditioning != "none"

    @property
    def needs_state(self) -> bool:
        return self.config.state_dim > 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's parameters."""
        return next(self.parameters()).dtype

    @abc.abstractmethod
    def per_sample_loss(self, context: ActionContext, actions: Tensor, is_pad: Tensor | None) -> Tensor:
        """`[B]` float32: each sample's loss, averaged over the steps that `is_pad` `[B, C]` does not exclude.

        A sample with every step excluded has loss 0.
        """

    @abc.abstractmethod
    def predict(self, context: ActionContext, sampling: SamplingOptions) -> Tensor:
        """`[B, C, A]` float32. The caller holds `no_grad` and eval mode.

        Args:
            context: what the head looks at.
            sampling: source of noise, which a regression ignores, and the real-time-chunking arguments; its
                `guidance` is not called without a `prev_chunk_left_over`.
        """

    def check_context(self, context: ActionContext) -> int:
        """Checks that the context holds what the head was built for, and returns its batch size B.

        Raises:
            ValueError: something is missing or has another shape than the head was built for.
        """
        kind = self.config.kind
        present: list[tuple[str, Tensor, tuple[int | None, ...]]] = []
        if self.needs_prefix:
            prefix = context.prefix
            if prefix is None:
                raise _missing(kind, "prefix", f"hidden states [B, L, {self.sizes.prefix_dim}]")
            present.append(("prefix.hidden", prefix.hidden, (None, None, self.sizes.prefix_dim)))
            present.append(("prefix.valid_mask", prefix.valid_mask, (None, prefix.hidden.shape[1])))
        if self.needs_codes:
            present.append((self._codes_field, self.read_codes(context), (None, *self._codes_shape)))
        if self.needs_state:
            if context.state is None:
                raise _missing(kind, "state", f"[B, {self.config.state_dim}]")
            present.append(("state", context.state, (None, self.config.state_dim)))
        batch_size = present[0][1].shape[0]
        for name, tensor, (_, *rest) in present:
            check_shape(f"{name} of action head '{kind}'", tensor, (batch_size, *rest))
        return batch_size

    @property
    def _codes_field(self) -> str:
        return "code_vectors" if self.config.code_conditioning == "vector" else "code_probs"

    @property
    def _codes_shape(self) -> tuple[int, int | None]:
        is_vector = self.config.code_conditioning == "vector"
        return self.sizes.code_seq_len, self.config.code_vector_dim if is_vector else self.sizes.codebook_size

    def read_codes(self, context: ActionContext) -> Tensor:
        """`[B, S, K]` codes or `[B, S, V]` vectors, whichever the head is conditioned on.

        Raises:
            ValueError: the context has none.
        """
        codes = getattr(context, self._codes_field)
        if codes is None:
            raise _missing(self.config.kind, self._codes_field, f"[B, {', '.join(map(str, self._codes_shape))}]")
        return codes

    def read_labels(self, actions: Tensor, is_pad: Tensor | None, batch_size: int) -> Tensor:
        """The labels as `[B, C, A]` float32, with 0 in the padded steps, which may hold anything.

        Raises:
            ValueError: another shape than `[B, C, A]` (`[B, C]` for `is_pad`).
        """
        chunk, width = self.config.chunk_size, self.config.action_dim
        check_shape("actions", actions, (batch_size, chunk, width))
        if is_pad is not None:
            check_shape("action_is_pad", is_pad, (batch_size, chunk))
            hint = "convert it by .bool(); True marks padding."
            expect(is_pad.dtype == torch.bool, "action_is_pad", "bool", is_pad.dtype, hint)
            actions = actions.masked_fill(is_pad[..., None], 0.0)
        return actions.float()


def build_code_embedding(config: ActionHeadConfig, sizes: ContextSizes) -> CodeEmbedding | VectorEmbedding:
    """What turns `ActionHead.read_codes` into tokens `[B, S, hidden_dim]`."""
    if config.code_conditioning == "vector":
        assert config.code_vector_dim is not None  # checked by ActionHead
        return VectorEmbedding(config.code_vector_dim, sizes.code_seq_len, config.hidden_dim)
    return CodeEmbedding(sizes.codebook_size, sizes.code_seq_len, config.hidden_dim)


def mean_over_steps(error: Tensor, is_pad: Tensor | None) -> Tensor:
    """Mean of `error` `[B, C, A]` over A and the steps that are not padding: `[B]`; 0 where all are."""
    error = error.mean(dim=-1)  # (B, C)
    if is_pad is None:
        return error.mean(dim=-1)
    return error.masked_fill(is_pad, 0.0).sum(dim=-1) / (~is_pad).sum(dim=-1).clamp(min=1)


def check_shape(what: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = tensor.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    next_step = "build the head with the sizes of the data, or pass data of these sizes."
    expect(fits, what, f"shape {expected}", list(tensor.shape), next_step)


def _missing(kind: str, name: str, expected: str) -> ValueError:
    return ValueError(
        f"{name} of action head '{kind}': expected {expected}, got None. "
        f"Next step: put {name} into the ActionContext, or build the head without it."
    )
