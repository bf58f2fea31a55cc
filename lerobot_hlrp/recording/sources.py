"""The environments that come with a scripted expert, made from LeRobot's environment configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lerobot.envs.configs import EnvConfig

from hlrp_core.expectation import expect
from lerobot_hlrp.recording.episode import ExpertEnv


@dataclass(frozen=True)
class Source:
    """What is recorded.

    envs: one per task; kept episode number e comes from `envs[e % len(envs)]`. settings: everything about the
    environments that the frames depend on. use_video: how frames are stored unless the user says otherwise.
    """

    name: str
    envs: list[ExpertEnv]
    settings: dict[str, Any]
    fps: int
    image_shape: tuple[int, int, int]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    use_video: bool = field(default=False)


def make_source(config: EnvConfig) -> Source:
    """Raises ValueError for an environment without an expert, and for one that cannot run here."""
    choices = f"an environment with a scripted expert ({', '.join(_SOURCES)})"
    expect(config.type in _SOURCES, "--env.type", choices, repr(config.type), "Set --env.type to one of these.")
    return _SOURCES[config.type](config)


def _tabletop_source(config: Any) -> Source:
    if config.instructions == "shuffled":
        raise ValueError(
            "--env.instructions: expected true or none, got 'shuffled': words of another object would teach the wrong "
            "thing. Next step: Leave it out; shuffled instructions are for evaluation."
        )
    size = config.image_size
    return Source(
        name=config.type,
        envs=[config.make_single(tier) for tier in config.tiers],
        settings={"env": config.type, "tasks": config.tiers, **config.gym_kwargs},
        fps=config.fps,
        image_shape=(size, size, 3),
        state_names=("x", "y"),
        action_names=("x", "y"),
    )


def _metaworld_source(config: Any) -> Source:
    from lerobot_hlrp.recording.metaworld import make_expert_envs

    if config.obs_type != "pixels_agent_pos":
        raise ValueError(
            f"--env.obs_type: expected 'pixels_agent_pos', got {config.obs_type!r}. Next step: Leave it out."
        )
    names, envs = make_expert_envs(config.task, config.gym_kwargs)
    names_of_axes = ("x", "y", "z", "gripper")
    return Source(
        name=config.type,
        envs=envs,
        settings={"env": config.type, "tasks": names, **config.gym_kwargs},
        fps=config.fps,
        image_shape=config.features["pixels/top"].shape,
        state_names=names_of_axes,
        action_names=names_of_axes,
        use_video=True,
    )


_SOURCES: dict[str, Callable[[Any], Source]] = {"hlrp_tabletop": _tabletop_source, "metaworld": _metaworld_source}
