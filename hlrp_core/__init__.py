"""Latent actions: quantiser, vision-language backends, action heads. No LeRobot in here."""

from hlrp_core.contract import (
    ActionBatch,
    ActionOutput,
    ActionPolicyBackend,
    BackendMode,
    FoundationBatch,
    LatentOutput,
    LossOutput,
    SamplingOptions,
    UnsupportedModeError,
    VLABackend,
)
from hlrp_core.registry import available_backends, make_backend, register_backend

__all__ = [
    "ActionBatch",
    "ActionOutput",
    "ActionPolicyBackend",
    "BackendMode",
    "FoundationBatch",
    "LatentOutput",
    "LossOutput",
    "SamplingOptions",
    "UnsupportedModeError",
    "VLABackend",
    "available_backends",
    "make_backend",
    "register_backend",
]
