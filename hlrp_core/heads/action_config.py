"""Settings of an action head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from hlrp_core.expectation import expect, expect_choice
from hlrp_core.heads.flow_matching import TimeSampling

CodeConditioning = Literal["none", "tokens", "soft", "vector"]


@dataclass
class ActionHeadConfig:
    """Settings of an action head; sizes of the data come from the dataset.

    The attention and flow settings are read by the flow heads alone.

    Args:
        kind: `mlp`, `flow`, `prefix_flow` or `laq`.
        chunk_size: C, actions predicted at once.
        action_dim: A.
        state_dim: D; 0 where the robot reports no state.
        hidden_dim: width of the head.
        num_layers: layers of the head.
        num_heads: attention heads.
        num_kv_heads: key and value heads, shared by groups of attention heads. None: `num_heads`.
        head_dim: width of one attention head. None: `hidden_dim / num_heads`.
        mlp_dim: inner width of a layer's gated MLP. None: 8/3 of `hidden_dim`, rounded up to
            a multiple of 64.
        time_dim: width of the flow-time embedding that modulates every layer.
        num_flow_steps: Euler steps from noise to an action chunk.
        num_noise_draws: (noise, time) pairs per sample and training step. They share one encoding of the
            prefix, so a second draw costs the expert's pass and not the backbone's.
        time_sampling: distribution of the training times: `beta` (Beta(1.5, 1), more weight near the noise,
            as in pi0 and SmolVLA) or `uniform`.
        code_conditioning: how codes reach the head: `tokens` (the predicted code of each position), `soft`
            (its distribution), `vector` (the predicted code vector, of a code head that predicts vectors), `none`
            (only `prefix_flow` may do without).
        dropout: in the head's layers.
        code_vector_dim: width of the LAQ's code vectors, for the head `laq` and `code_conditioning=vector` alone.

    Raises:
        ValueError: a setting is out of range, or two do not fit each other.
    """

    kind: str = "prefix_flow"
    chunk_size: int = 8
    action_dim: int = 2
    state_dim: int = 0
    hidden_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    time_dim: int = 128
    num_flow_steps: int = 10
    num_noise_draws: int = 1
    time_sampling: TimeSampling = "beta"
    code_conditioning: CodeConditioning = "none"
    dropout: float = 0.0
    code_vector_dim: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            expect(getattr(self, name) >= 1, f"action head {name}", "1 or more", getattr(self, name), "raise it.")
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "code_vector_dim"):
            value = getattr(self, name)
            expect(value is None or value >= 1, f"action head {name}", "1 or more, or None", value, "raise it.")
        expect(self.state_dim >= 0, "action head state_dim", "0 (no state) or more", self.state_dim, "raise it.")
        expect(0 <= self.dropout < 1, "action head dropout", "0 <= dropout < 1", self.dropout, "lower it.")
        expect_choice("action head code_conditioning", self.code_conditioning, get_args(CodeConditioning))
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


_COUNTS = (
    "chunk_size",
    "action_dim",
    "hidden_dim",
    "num_layers",
    "num_heads",
    "time_dim",
    "num_flow_steps",
    "num_noise_draws",
)
