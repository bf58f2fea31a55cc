"""Policy of `hlrp_qwen`."""

from __future__ import annotations

from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.policy import HLRPPolicy


class HLRPQwenPolicy(HLRPPolicy):
    """A Qwen3-VL backbone as a LeRobot policy. See `HLRPPolicy`."""

    config_class = HLRPQwenConfig
    name = "hlrp_qwen"
