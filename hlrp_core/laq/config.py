"""Settings of a latent-action quantiser; they travel with its weights.

The comment above a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

SCHEMA_VERSION = 1

QuantizerName = Literal["fsq", "vq", "diveq"]
TargetName = Literal["pixels", "features"]
QUANTIZERS = ("fsq", "vq", "diveq")
TARGETS = ("pixels", "features")
MAX_LEVELS = 16  # of one dimension of a code


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
        default = {field.name: field.default for field in fields(self)}
        for name, least in (("codebook_size", 2), ("code_seq_len", 1), ("frame_gap", 1), ("num_frames", 2)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"laq.{name}: expected {least} or more, got {getattr(self, name)}. Next step: use {default[name]}."
                )
        for name, choices in (("quantizer", QUANTIZERS), ("target", TARGETS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"laq.{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}. "
                    f"Next step: use {choices[0]}."
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"laq.image_size: expected a multiple of patch_size={self.patch_size}, got {self.image_size}. "
                f"Next step: use {self.image_size // self.patch_size * self.patch_size}."
            )
        if self.patch_size % 2 or self.hidden_dim % 8:
            raise ValueError(
                f"laq: expected an even patch_size and a hidden_dim that is a multiple of 8, got {self.patch_size} and "
                f"{self.hidden_dim}. Next step: use patch_size=4 and hidden_dim=64."
            )
        if self.target == "features" and self.feature_encoder is None:
            raise ValueError(
                "laq.feature_encoder: expected the Hub id or folder of a frozen encoder for target='features', got "
                "none. Next step: set it, for example to facebook/dinov2-small, or use target=pixels."
            )
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"laq: expected schema version {SCHEMA_VERSION}, got {self.schema_version}. "
                "Next step: load it with the version of this package that saved it."
            )
        if self.fsq_depth < 1 or self.code_seq_len % self.fsq_depth:
            raise ValueError(
                f"laq.fsq_depth: expected a divisor of code_seq_len={self.code_seq_len}, got {self.fsq_depth}. "
                "Next step: use 1 (every position has latents of its own)."
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
