"""Policy of `hlrp_smol_latent`."""

from __future__ import annotations

from lerobot_hlrp.configuration_hlrp_smol_latent import HLRPSmolLatentConfig
from lerobot_hlrp.policy import HLRPPolicy


class HLRPSmolLatentPolicy(HLRPPolicy):
    """A SmolVLM2 backbone with a latent head, as a LeRobot policy. See `HLRPPolicy`."""

    config_class = HLRPSmolLatentConfig
    name = "hlrp_smol_latent"
