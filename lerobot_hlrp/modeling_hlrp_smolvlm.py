"""Policy of `hlrp_smolvlm`."""

from __future__ import annotations

from lerobot_hlrp.configuration_hlrp_smolvlm import HLRPSmolVLMConfig
from lerobot_hlrp.policy import HLRPPolicy


class HLRPSmolVLMPolicy(HLRPPolicy):
    """A SmolVLM2 backbone that writes codes, as a LeRobot policy. See `HLRPPolicy`."""

    config_class = HLRPSmolVLMConfig
    name = "hlrp_smolvlm"
