"""Config of `hlrp_smolvlm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs.policies import PreTrainedConfig

from lerobot_hlrp.policy_config import HLRPConfig


@PreTrainedConfig.register_subclass("hlrp_smolvlm")
@dataclass
class HLRPSmolVLMConfig(HLRPConfig):
    """Latent actions on a backbone of the SmolVLM2 family, which writes codes as tokens."""

    backends: ClassVar[dict[tuple[str, str], str]] = {
        ("chat", "tokens"): "smol_chat",
        ("plain", "tokens"): "smol_plain",
    }
