"""A small language-conditioned tabletop for gymnasium: NumPy only, no simulator and no download.

`gymnasium.make("hlrp_tabletop/reach")`, `gymnasium.make("hlrp_tabletop/push")`, or `TabletopEnv("reach")` directly.
"""

import gymnasium as gym

from hlrp_tabletop.env import EPISODE_LENGTH, FPS, MAX_STEP, TabletopEnv
from hlrp_tabletop.tasks import COLOURS, INSTRUCTION_MODES, PHRASINGS, SHAPE_NAMES, TIERS

for _tier in TIERS:
    # No `max_episode_steps`: the environment truncates by itself.
    gym.register(f"hlrp_tabletop/{_tier}", entry_point="hlrp_tabletop.env:TabletopEnv", kwargs={"tier": _tier})

__all__ = [
    "COLOURS",
    "EPISODE_LENGTH",
    "FPS",
    "INSTRUCTION_MODES",
    "MAX_STEP",
    "PHRASINGS",
    "SHAPE_NAMES",
    "TIERS",
    "TabletopEnv",
]
