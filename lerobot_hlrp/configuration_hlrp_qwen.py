"""Config of `hlrp_qwen`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs.policies import PreTrainedConfig

from lerobot_hlrp.policy_config import HLRPConfig


@PreTrainedConfig.register_subclass("hlrp_qwen")
@dataclass
class HLRPQwenConfig(HLRPConfig):
    """Latent actions on a backbone of the Qwen3-VL family (Qwen3-VL, Cosmos-Reason2).

    Codes are tokens that it writes, or logits or vectors that a head reads off a plain prompt's hidden states.
    """

    backends: ClassVar[dict[tuple[str, str], str]] = {
        ("chat", "tokens"): "qwen_chat",
        ("plain", "tokens"): "qwen_plain",
        ("plain", "latent"): "qwen_latent_head",
        ("plain", "vector"): "qwen_vector_head",
    }
