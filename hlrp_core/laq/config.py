"""Settings of a latent-action quantiser; they travel with its weights.

The comment above a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hlrp_core.expectation import expect, expect_at_least, expect_choice

SCHEMA_VERSION = 1

QuantizerName = Literal["fsq", "vq", "diveq"]
TargetName = Literal["pixels", "features"]
QUANTIZERS = ("fsq", "vq", "diveq")
TARGETS = ("pixels", "features")
MAX_LEVELS = 16  # of one dimension of a code

_LEAST = {
    "codebook_size": 2,
    "code_seq_len": 1,
    "frame_gap": 1,
    "num_frames": 2,
    "fsq_depth": 1,
    "image_size": 1,
    "patch_size": 2,
    "hidden_dim": 8,
    "num_layers": 1,
    "code_dim": 1,
    "motion_weight": 0,
}


@dataclass
class LAQConfig:
    """Raises:
    ValueError: a setting is out of range, or two do not fit each other.
    """

    # K, entries that each code position chooses from.
    codebook_size: int = 8
    # S, code positions for one transition.
    code_seq_len: int = 4
    # Δ, dataset frames between two neighbouring frames.
    frame_gap: int = 3
    # T; T frames are T-1 transitions, and a label has (T-1)*S codes.
    num_frames: int = 2
    # `fsq` (finite scalar quantisation: no collapse, no auxiliary loss), `vq` (learnt codebook by moving averages, dead
    # codes replaced) or `diveq` (learnt by gradient through a noisy direction, in the manner of NSVQ).
    quantizer: QuantizerName = "fsq"
    # How many positions refine one another, with `fsq`; a divisor of S. 1: every position has latents of its own. At
    # depth 2 the second half of the positions says what the first half has left over: finer, with half as many latents.
    fsq_depth: int = 1
    # Pixels along the side of the square that frames are resized to.
    image_size: int = 64
    # Pixels along the side of a patch of that square.
    patch_size: int = 4
    # Channels of encoder and decoder; a multiple of 8.
    hidden_dim: int = 64
    # Convolution blocks of the decoder.
    num_layers: int = 4
    # D, width of a code vector (`vq`, `diveq`); `fsq` has one dimension for each of its levels.
    code_dim: int = 16
    # What is reconstructed: `pixels`, or `features` of a frozen encoder.
    target: TargetName = "pixels"
    # Hub id or folder of that encoder, a vision transformer of transformers (DINOv2, DINOv3, ...).
    feature_encoder: str | None = None
    # Channels and grid side of its features; filled in when the LAQ is made.
    feature_shape: tuple[int, int] = (0, 0)
    # How much more a pixel counts that differs between the two frames.
    motion_weight: float = 20.0
    # Filled in: of the saved settings.
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        channels, size = self.feature_shape
        self.feature_shape = (channels, size)  # JSON knows no tuples
        for name, least in _LEAST.items():
            expect_at_least(f"laq.{name}", least, getattr(self, name))
        expect_choice("laq.quantizer", self.quantizer, QUANTIZERS)
        expect_choice("laq.target", self.target, TARGETS)
        expect(self.patch_size % 2 == 0, "laq.patch_size", "an even number", self.patch_size, "Use 4.")
        expect(
            self.image_size % self.patch_size == 0,
            "laq.image_size",
            f"a multiple of patch_size={self.patch_size}",
            self.image_size,
            f"Use {max(self.image_size // self.patch_size, 1) * self.patch_size}.",
        )
        expect(self.hidden_dim % 8 == 0, "laq.hidden_dim", "a multiple of 8", self.hidden_dim, "Use 64.")
        expect(
            self.target != "features" or self.feature_encoder is not None,
            "laq.feature_encoder",
            "the Hub id or folder of a frozen encoder for target='features'",
            "none",
            "Set it, for example to facebook/dinov2-small, or use target=pixels.",
        )
        expect(
            self.schema_version == SCHEMA_VERSION,
            "laq",
            f"schema version {SCHEMA_VERSION}",
            self.schema_version,
            "Load it with the version of this package that saved it.",
        )
        expect(
            self.code_seq_len % self.fsq_depth == 0,
            "laq.fsq_depth",
            f"a divisor of code_seq_len={self.code_seq_len}",
            self.fsq_depth,
            "Use 1 (every position has latents of its own).",
        )
        if self.quantizer == "fsq":
            fsq_levels(self.codebook_size)

    @property
    def codes_per_label(self) -> int:
        """(T-1)*S."""
        return (self.num_frames - 1) * self.code_seq_len


def fsq_levels(codebook_size: int) -> list[int]:
    """Levels whose product is exactly K: as few as possible, each at most 16, and even: 8 -> [8], 256 -> [16, 16].

    Raises:
        ValueError: K has a prime factor above 16; the nearest sizes without one are named.
    """
    levels = _factor(codebook_size)
    if levels is None:
        below = next(k for k in range(codebook_size - 1, 1, -1) if _factor(k) is not None)
        above = next(k for k in range(codebook_size + 1, 2 * codebook_size + 2) if _factor(k) is not None)
        raise ValueError(
            f"laq.codebook_size: expected a product of numbers up to {MAX_LEVELS} for quantizer='fsq', got "
            f"{codebook_size}. Next step: use {below} or {above}, or quantizer=vq."
        )
    return levels


def _factor(number: int, most: int = MAX_LEVELS) -> list[int] | None:
    """The shortest list of falling factors up to `most` whose product is `number`, the most even one of that length."""
    if number == 1:
        return []
    best: list[int] | None = None
    for factor in range(2, min(number, most) + 1):  # rising: of equal lengths the one with the smallest maximum stays
        if number % factor == 0:
            rest = _factor(number // factor, factor)
            if rest is not None and (best is None or 1 + len(rest) < len(best)):
                best = [factor, *rest]
    return best
