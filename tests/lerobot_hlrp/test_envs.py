"""`--env.type=hlrp_tabletop`: the settings, the vector environments, and LeRobot's own rollout on them."""

from __future__ import annotations

import dataclasses
from functools import partial

import draccus
import numpy as np
import pytest
import torch
from draccus.utils import ParsingError
from lerobot.envs import make_env
from lerobot.envs.configs import EnvConfig
from lerobot.envs.utils import env_to_policy_features, preprocess_observation
from lerobot.scripts.lerobot_eval import rollout

from hlrp_tabletop import EPISODE_LENGTH, TabletopEnv
from lerobot_hlrp.envs import TabletopEnvConfig


@dataclasses.dataclass
class Command:
    env: EnvConfig


def parse(*flags: str) -> TabletopEnvConfig:
    env = draccus.parse(Command, args=["--env.type=hlrp_tabletop", *flags]).env
    assert isinstance(env, TabletopEnvConfig)
    return env


class ExpertPolicy(torch.nn.Module):
    """Asks the environments themselves what to do, and keeps what it was shown."""

    def __init__(self, vec):
        super().__init__()
        self.vec = vec
        self.seen: list[dict] = []

    def reset(self) -> None:
        self.seen.clear()

    def select_action(self, observation: dict) -> torch.Tensor:
        self.seen.append(observation)
        return torch.from_numpy(np.stack(self.vec.call("expert_action")))


def roll_out(vec, policy: torch.nn.Module, seeds: list[int]) -> dict:
    same = partial(lambda value: value)
    return rollout(vec, policy, same, same, same, same, seeds=seeds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flag", "expected"), [("true", "true"), ("True", "true"), ("shuffled", "shuffled"), ("none", "none")]
)
def test_instructions_on_the_command_line(flag: str, expected: str):
    assert parse(f"--env.instructions={flag}").instructions == expected
    assert parse().instructions == "true"


def test_settings_survive_a_config_file(tmp_path):
    config = parse("--env.instructions=true", "--env.task=reach,push", "--env.image_size=64", "--env.episode_length=9")
    path = tmp_path / "config.json"
    with draccus.config_type("json"):
        with path.open("w") as file:
            draccus.dump(Command(config), file)
        assert draccus.parse(Command, config_path=path, args=[]).env == config


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--env.task=lift", "--env.task: expected one of reach, push, got 'lift'. Next step: "),
        ("--env.task=reach,", "--env.task: expected one of reach, push, got ''. Next step: "),
        ("--env.instructions=wrong", "instructions: expected one of"),
        ("--env.num_objects=2", "num_objects: expected 3 to 6"),
        ("--env.phrasing=poetic", "phrasing: expected one of"),
    ],
)
def test_bad_settings_are_refused(flag: str, named: str):
    with pytest.raises(ParsingError) as caught:
        parse(flag)
    assert named in str(caught.value.__cause__)


def test_every_setting_reaches_the_environment():
    config = TabletopEnvConfig(
        task="reach", instructions="none", phrasing="varied", num_objects=4, image_size=48, episode_length=7
    )
    env = config.make_single("reach")
    env.reset(seed=0)
    assert (env.instructions, env.phrasing, env.num_objects) == ("none", "varied", 4)
    assert env._max_episode_steps == 7
    assert env.observation_space["pixels"].shape == (48, 48, 3)
    assert set(config.gym_kwargs) == {"instructions", "phrasing", "num_objects", "image_size", "episode_length"}


def test_features_are_those_of_the_observation():
    config = TabletopEnvConfig(image_size=64)
    features = env_to_policy_features(config)
    observation, _ = config.make_single("reach").reset(seed=0)
    tensors = preprocess_observation(observation)
    assert set(features) == {"action", *tensors}
    for key, tensor in tensors.items():
        assert tuple(tensor.shape[1:]) == features[key].shape


def test_each_tier_is_a_suite():
    envs = make_env(TabletopEnvConfig(task="reach, push"), n_envs=2, use_async_envs=True)
    assert {tier: list(tasks) for tier, tasks in envs.items()} == {"reach": [0], "push": [0]}
    for tier, tasks in envs.items():
        assert tasks[0].call("task") == (tier, tier)
        assert tasks[0].call("_max_episode_steps")[0] == EPISODE_LENGTH[tier]
        assert tasks[0].unwrapped.metadata["render_fps"] == TabletopEnvConfig().fps


@pytest.mark.parametrize("instructions", ["true", "shuffled"])
def test_lerobots_rollout(instructions: str):
    """The policy sees the keys, pictures and words of each seed's scene, and success is reported per environment."""
    seeds = [1000, 1001, 1002, 1003]
    vec = make_env(TabletopEnvConfig(task="reach", instructions=instructions), n_envs=4)["reach"][0]
    policy = ExpertPolicy(vec)
    result = roll_out(vec, policy, seeds)
    assert result["success"].any(1).all()
    first = policy.seen[0]
    assert set(first) == {"observation.image", "observation.state", "task"}
    for i, seed in enumerate(seeds):
        env = TabletopEnv("reach", instructions=instructions)
        observation, _ = env.reset(seed=seed)
        assert first["task"][i] == env.task_description
        picture = torch.from_numpy(observation["pixels"]).permute(2, 0, 1) / 255
        torch.testing.assert_close(first["observation.image"][i], picture, rtol=0, atol=0)
        length = int(result["done"][i].int().argmax()) + 1
        assert result["reward"][i, :length].sum() == 1
    second = roll_out(vec, policy, seeds)  # the next rollout starts anew, with the same seeds the same
    torch.testing.assert_close(second["action"], result["action"], rtol=0, atol=0)
    vec.close()


class WordFollower(ExpertPolicy):
    """Goes straight to the object that the instruction names."""

    def select_action(self, observation: dict) -> torch.Tensor:
        actions = []
        for env, text in zip(self.vec.envs, observation["task"], strict=True):
            scene = env.unwrapped.scene
            named = [i for i in range(scene.num_objects) if scene.object_name(i) in text]
            offset = scene.positions[named[0]] - scene.gripper
            actions.append(offset / np.abs(offset).max())
        return torch.from_numpy(np.stack(actions))


@pytest.mark.parametrize(("instructions", "succeeds"), [("true", True), ("shuffled", False)])
def test_following_the_words_succeeds_unless_they_are_shuffled(instructions: str, succeeds: bool):
    vec = make_env(TabletopEnvConfig(task="reach", instructions=instructions), n_envs=8)["reach"][0]
    result = roll_out(vec, WordFollower(vec), list(range(8)))
    assert result["success"].any(1).tolist() == [succeeds] * 8
    vec.close()


def test_worker_processes_do_the_same():
    results = []
    for workers in (False, True):
        config = TabletopEnvConfig(task="push", worker_processes=workers)
        vec = make_env(config, n_envs=2, use_async_envs=True)["push"][0]
        results.append(roll_out(vec, ExpertPolicy(vec), [5, 6]))
        assert type(vec).__name__ == ("AsyncVectorEnv" if workers else "SyncVectorEnv")
        vec.close()
    ends = [result["done"].int().argmax(1) for result in results]
    torch.testing.assert_close(ends[0], ends[1])
    for result in results:
        assert result["success"].any(1).all()
    shorter = int(ends[0].min()) + 1
    torch.testing.assert_close(results[0]["action"][:, :shorter], results[1]["action"][:, :shorter])
