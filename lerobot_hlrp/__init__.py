"""Latent actions in LeRobot: policy types and environments, known to LeRobot once this package is imported."""

from lerobot_hlrp.log_filters import shorten_warnings
from lerobot_hlrp.registration import import_after

for _policy_type in ("hlrp_qwen", "hlrp_smolvlm", "hlrp_smol_latent"):
    import_after("lerobot.configs.policies", f"lerobot_hlrp.configuration_{_policy_type}")
import_after("lerobot.envs.configs", "lerobot_hlrp.envs")
shorten_warnings()
