"""Settings of an action head. The comment above a field is its help text on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hlrp_core.expectation import expect, expect_choice
from hlrp_core.heads.flow_matching import TimeSampling

CodeConditioning = Literal["none", "tokens", "soft", "vector"]


@dataclass
class ActionExpertConfig:
    """Sizes of an action head, and how a flow learns and draws. A head reads what concerns it.

    Raises:
        ValueError: a setting is out of range, or two do not fit each other.
    """

    # Width of the head.
    hidden_dim: int = 256
    # Layers of the head.
    num_layers: int = 4
    # Attention heads.
    num_heads: int = 4
    # Key and value heads, shared by groups of attention heads. By default `num_heads`.
    num_kv_heads: int | None = None
    # Width of one attention head. By default `hidden_dim / num_heads`.
    head_dim: int | None = None
    # Inner width of a layer's gated MLP. By default 8/3 of `hidden_dim`, rounded up to a multiple of 64.
    mlp_dim: int | None = None
    # Width of the flow time's embedding, which modulates every layer.
    time_dim: int = 128
    # Euler steps from noise to a chunk of actions. May change after training.
    num_flow_steps: int = 10
    # Pairs of noise and time per sample and training step. They share one encoding of the prefix, so that a second draw
    # costs the head's pass and not the backbone's.
    num_noise_draws: int = 1
    # Distribution of the training times: `beta` (Beta(1.5, 1), more weight near the noise, as in pi0 and SmolVLA) or
    # `uniform`.
    time_sampling: TimeSampling = "beta"
    # In the head's layers.
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "num_layers", "num_heads", "time_dim", "num_flow_steps", "num_noise_draws"):
            expect(getattr(self, name) >= 1, f"action head {name}", "1 or more", getattr(self, name), "raise it.")
        for name in ("num_kv_heads", "head_dim", "mlp_dim"):
            value = getattr(self, name)
            expect(value is None or value >= 1, f"action head {name}", "1 or more, or None", value, "raise it.")
        expect(0 <= self.dropout < 1, "action head dropout", "0 <= dropout < 1", self.dropout, "lower it.")
        expect_choice("action head time_sampling", self.time_sampling, get_args(TimeSampling))
        expect(self.time_dim % 2 == 0, "action head time_dim", "an even number", self.time_dim, "add 1 to it.")
        expect(
            self.head_dim is not None or self.hidden_dim % self.num_heads == 0,
            "action head hidden_dim",
            f"a multiple of num_heads={self.num_heads}",
            self.hidden_dim,
            "change one of them, or set head_dim.",
        )
        expect(
            self.num_heads % self.resolved_num_kv_heads == 0,
            "action head num_kv_heads",
            f"a divisor of num_heads={self.num_heads}",
            self.num_kv_heads,
            "change one of them.",
        )

    @property
    def resolved_num_kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def resolved_mlp_dim(self) -> int:
        return self.mlp_dim or -(-8 * self.hidden_dim // (3 * 64)) * 64


@dataclass
class ActionHeadConfig(ActionExpertConfig):
    """An action head, with the sizes of the data that it is made for.

    Raises:
        ValueError: a setting is out of range, or two do not fit each other.
    """

    # `mlp`, `flow`, `prefix_flow` or `laq`.
    kind: str = "prefix_flow"
    # C, actions predicted at once.
    chunk_size: int = 8
    # A.
    action_dim: int = 2
    # D; 0 where the robot reports no state.
    state_dim: int = 0
    # How codes reach the head: `tokens` (the predicted code of each position), `soft` (its distribution), `vector` (the
    # predicted code vector, of a code head that predicts vectors), `none` (only `prefix_flow` may do without).
    code_conditioning: CodeConditioning = "none"
    # Width of the LAQ's code vectors, for the head `laq` and `code_conditioning=vector` alone.
    code_vector_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "action_dim"):
            expect(getattr(self, name) >= 1, f"action head {name}", "1 or more", getattr(self, name), "raise it.")
        width = self.code_vector_dim
        expect(width is None or width >= 1, "action head code_vector_dim", "1 or more, or None", width, "raise it.")
        expect(self.state_dim >= 0, "action head state_dim", "0 (no state) or more", self.state_dim, "raise it.")
        expect_choice("action head code_conditioning", self.code_conditioning, get_args(CodeConditioning))
