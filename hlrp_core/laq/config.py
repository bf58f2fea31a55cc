"""Settings of a latent-action quantiser; they travel with its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 1

QuantizerName = Literal["fsq", "vq", "diveq"]
QUANTIZERS = ("fsq", "vq", "diveq")
TARGETS = ("pixels", "features")


@dataclass
class LAQConfig:
    """Args:
    codebook_size: K, entries that each code position chooses from.
    code_seq_len: S, code positions for one transition.
    frame_gap: Δ, dataset frames between two neighbouring frames.
    num_frames: T; T frames are T-1 transitions, and a label has (T-1)*S codes.
    quantizer: `fsq` (finite scalar quantisation: no collapse, no auxiliary loss), `vq` (learnt codebook by moving
        averages, dead codes replaced) or `diveq` (learnt by gradient through a noisy direction, in the manner of NSVQ).
    image_size: side of the square that frames are resized to.
    patch_size: side of a patch of that square.
    hidden_dim: channels of encoder and decoder.
    num_layers: convolution blocks of each.
    code_dim: D of a code vector (`vq`, `diveq`); `fsq` has one dimension for each of its levels.
    target: what is reconstructed: `pixels`, or `features` of a frozen encoder.
    feature_encoder: Hub id or folder of that encoder (DINOv2, DINOv3, ...).
    motion_weight: how much more a pixel counts that differs between the two frames.
    """

    codebook_size: int = 8
    code_seq_len: int = 4
    frame_gap: int = 3
    num_frames: int = 2
    quantizer: QuantizerName = "fsq"
    image_size: int = 64
    patch_size: int = 4
    hidden_dim: int = 64
    num_layers: int = 4
    code_dim: int = 16
    target: Literal["pixels", "features"] = "pixels"
    feature_encoder: str | None = None
    motion_weight: float = 20.0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, least in (("codebook_size", 2), ("code_seq_len", 1), ("frame_gap", 1), ("num_frames", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"laq.{name}: expected {least} or more, got {getattr(self, name)}")
        for name, choices in (("quantizer", QUANTIZERS), ("target", TARGETS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"laq.{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"laq.image_size: expected a multiple of patch_size={self.patch_size}, got {self.image_size}. "
                f"Next step: use {self.image_size // self.patch_size * self.patch_size}."
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
        if self.quantizer == "fsq":
            fsq_levels(self.codebook_size)

    @property
    def codes_per_label(self) -> int:
        """(T-1)*S."""
        return (self.num_frames - 1) * self.code_seq_len


def fsq_levels(codebook_size: int) -> list[int]:
    """Levels whose product is exactly K, as even as K allows: 8 -> [2, 2, 2], 256 -> [4, 4, 4, 4].

    Raises:
        ValueError: K has a prime factor above 7; the nearest sizes without one are named.
    """
    levels = _factor(codebook_size)
    if levels is None:
        below = next(k for k in range(codebook_size - 1, 1, -1) if _factor(k) is not None)
        above = next(k for k in range(codebook_size + 1, 2 * codebook_size + 2) if _factor(k) is not None)
        raise ValueError(
            f"laq.codebook_size: expected a product of 2, 3, 5 and 7 for quantizer='fsq', got {codebook_size}. "
            f"Next step: use {below} or {above}, or quantizer=vq."
        )
    return levels


def _factor(number: int) -> list[int] | None:
    primes = []
    for prime in (7, 5, 3, 2):
        while number % prime == 0:
            primes.append(prime)
            number //= prime
    if number != 1:
        return None
    # pairs of twos become fours where there are many: fewer, finer dimensions are easier to use
    twos = primes.count(2)
    fours = twos // 2 if math.prod(primes) >= 64 else 0
    rest = [prime for prime in primes if prime != 2]
    return sorted(rest + [4] * fours + [2] * (twos - 2 * fours), reverse=True)
