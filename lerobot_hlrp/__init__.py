"""Latent actions in LeRobot: policy types and environments, known to LeRobot once this package is imported."""

from lerobot_hlrp.registration import import_after

import_after("lerobot.configs.policies", "lerobot_hlrp.configuration_hlrp_qwen")
import_after("lerobot.envs.configs", "lerobot_hlrp.envs")
