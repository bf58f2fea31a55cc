"""Config of `hlrp_smol_latent`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs.policies import PreTrainedConfig

from lerobot_hlrp.policy_config import HLRPConfig


@PreTrainedConfig.register_subclass("hlrp_smol_latent")
@dataclass
class HLRPSmolLatentConfig(HLRPConfig):
    """Latent actions on a backbone of the SmolVLM2 family, read off its hidden states by a small head."""

    backends: ClassVar[dict[tuple[str, str], str]] = {
        ("plain", "latent"): "smol_latent_head",
        ("plain", "vector"): "smol_vector_head",
    }

    # How the instruction becomes a prompt: `plain`, as nothing is generated from it.
    prompting: str = "plain"
    # How codes are predicted: `latent` reads them off the prompt's hidden states, `vector` the LAQ's continuous code
    # vectors.
    code_head: str = "latent"
