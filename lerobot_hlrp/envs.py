"""The tabletop as a LeRobot environment type: `--env.type=hlrp_tabletop`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from hlrp_core.expectation import expect_choice

if TYPE_CHECKING:
    from hlrp_tabletop import TabletopEnv

POSE_DIM = 2


@EnvConfig.register_subclass("hlrp_tabletop")
@dataclass
class TabletopEnvConfig(EnvConfig):
    """A tier of the tabletop, or both. Raises ValueError for settings that the environment does not have."""

    # The tier, `reach` or `push`, or both as `reach,push`. Each is its own suite: `--eval.n_episodes` counts per tier.
    task: str = "reach"
    fps: int = 10
    # `true`; `shuffled` names another object of the scene and judges by the original task; `none` says nothing.
    instructions: str = "true"
    # `fixed`, one sentence per tier, or `varied`, one of four.
    phrasing: str = "fixed"
    # 3 to 6; pushing takes 3.
    num_objects: int = 3
    # Height and width in pixels.
    image_size: int = 96
    # Steps after which an episode ends without success; by default the tier's own number.
    episode_length: int | None = None
    # Follow `--eval.use_async_envs`. Off, all environments run in the calling process: a step takes a fraction of a
    # millisecond, while starting a worker takes seconds.
    worker_processes: bool = False
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(POSE_DIM,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(POSE_DIM,)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
    )

    def __post_init__(self) -> None:
        from hlrp_tabletop import TIERS

        # The command line reads `true` as a boolean and hands the field its name, "True"; `null` arrives as None.
        self.instructions = str(self.instructions).lower()
        shape = (self.image_size, self.image_size, 3)
        self.features["pixels"] = PolicyFeature(type=FeatureType.VISUAL, shape=shape)
        for tier in self.tiers:
            expect_choice("--env.task", tier, TIERS)
            self.make_single(tier)  # the environment itself checks the settings

    @property
    def tiers(self) -> list[str]:
        """The tiers in the order given; a name may be there more than once."""
        return [tier.strip() for tier in str(self.task).split(",")]

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {
            "instructions": self.instructions,
            "phrasing": self.phrasing,
            "num_objects": self.num_objects,
            "image_size": self.image_size,
            "episode_length": self.episode_length,
        }

    def make_single(self, tier: str) -> TabletopEnv:
        """One environment of a tier."""
        return self._factory(tier)()

    def _factory(self, tier: str) -> Callable[[], TabletopEnv]:
        from hlrp_tabletop import TabletopEnv

        return partial(TabletopEnv, tier, **self.gym_kwargs)

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """`{tier: {0: vector environment}}`."""
        use_workers = use_async_envs and self.worker_processes and n_envs > 1
        return {tier: {0: self._create_vector_env(tier, n_envs, use_workers)} for tier in dict.fromkeys(self.tiers)}

    def _create_vector_env(self, tier: str, n_envs: int, use_workers: bool) -> gym.vector.VectorEnv:
        from lerobot.envs.utils import freeze_after_episode_end

        mode = gym.vector.AutoresetMode.NEXT_STEP
        if use_workers:  # without LeRobot's wrapper, so that a worker needs no torch
            return gym.vector.AsyncVectorEnv([self._factory(tier)] * n_envs, context="forkserver", autoreset_mode=mode)
        frozen = freeze_after_episode_end(self._factory(tier))
        return gym.vector.SyncVectorEnv([frozen] * n_envs, autoreset_mode=mode)
