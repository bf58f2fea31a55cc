"""The tabletop as an environment: gymnasium's contract, determinism, tasks and words, success."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from hlrp_tabletop import MAX_STEP, TIERS, TabletopEnv
from hlrp_tabletop.scene import OBJECT_RADIUS
from hlrp_tabletop.tasks import COLOUR_NAMES, SHAPE_NAMES

both_tiers = pytest.mark.parametrize("tier", TIERS)


def play(env: TabletopEnv, seed: int, choose) -> tuple[bool, list[np.ndarray]]:
    """One episode; returns success and all observations flattened."""
    observation, info = env.reset(seed=seed)
    seen, is_over = [observation["pixels"].ravel(), observation["agent_pos"]], False
    while not is_over:
        observation, _, terminated, truncated, info = env.step(choose(env))
        seen += [observation["pixels"].ravel(), observation["agent_pos"]]
        is_over = terminated or truncated
    return info["is_success"], seen


@both_tiers
def test_gymnasium_finds_nothing_wrong(tier: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*render.*", category=UserWarning)  # no spec: not made by gym.make
        check_env(TabletopEnv(tier))


@both_tiers
def test_registered_with_gymnasium(tier: str):
    env = gym.make(f"hlrp_tabletop/{tier}", image_size=64)
    observation, _ = env.reset(seed=0)
    assert observation["pixels"].shape == (64, 64, 3)
    assert env.unwrapped.tier == tier


@both_tiers
def test_expert_succeeds_and_chance_does_not(tier: str):
    env, rng = TabletopEnv(tier), np.random.default_rng(0)
    expert = [play(env, seed, lambda e: e.expert_action())[0] for seed in range(200)]
    chance = [play(env, seed, lambda e: rng.uniform(-1, 1, 2))[0] for seed in range(100)]
    assert np.mean(expert) >= 0.95
    assert np.mean(chance) <= 0.10


@both_tiers
def test_a_seed_fixes_everything(tier: str):
    first, second = TabletopEnv(tier), TabletopEnv(tier)
    play(second, 99, lambda e: e.expert_action())  # another history
    for one, other in zip(
        play(first, 5, lambda e: e.expert_action())[1], play(second, 5, lambda e: e.expert_action())[1], strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert first.task_description == second.task_description


def test_a_seed_fixes_everything_in_another_process():
    code = (
        "import hashlib; from hlrp_tabletop import TabletopEnv; env = TabletopEnv('push'); o, _ = env.reset(seed=11)\n"
        "for _ in range(8): o = env.step(env.expert_action())[0]\n"
        "print(hashlib.sha256(o['pixels'].tobytes() + o['agent_pos'].tobytes()).hexdigest(), env.task_description)"
    )
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1


@both_tiers
def test_different_seeds_give_different_scenes(tier: str):
    env = TabletopEnv(tier)
    starts, instructions, object_sets = set(), set(), set()
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        starts.add(observation["agent_pos"].tobytes())
        instructions.add(env.task_description)
        object_sets.add(tuple(sorted(env.scene.object_name(i) for i in range(env.scene.num_objects))))
    assert len(starts) == 60
    assert len(instructions) > 15
    assert len(object_sets) > 50


@both_tiers
def test_the_words_mean_exactly_one_object(tier: str):
    env = TabletopEnv(tier)
    for seed in range(100):
        env.reset(seed=seed)
        scene, task = env.scene, env.episode_task
        assert scene.num_objects >= 3
        names = [scene.object_name(i) for i in range(scene.num_objects)]
        assert [name for name in names if name in env.task_description] == [names[task.target]]
        assert len(set(scene.colours)) == scene.num_objects
        colour, shape = names[task.target].split()
        assert colour in COLOUR_NAMES
        assert shape in SHAPE_NAMES


@both_tiers
def test_objects_lie_apart_on_the_table(tier: str):
    env = TabletopEnv(tier)
    for seed in range(100):
        env.reset(seed=seed)
        positions = env.scene.positions
        assert (np.abs(positions) <= 1 - OBJECT_RADIUS).all()
        gaps = np.linalg.norm(positions[:, None] - positions, axis=-1)[~np.eye(len(positions), dtype=bool)]
        assert gaps.min() > 2 * OBJECT_RADIUS
        assert np.linalg.norm(positions - env.scene.gripper, axis=-1).min() > OBJECT_RADIUS


def test_every_object_is_meant_equally_often():
    """Neither the order of drawing nor the scene's layout tells which object is meant."""
    env, targets, nearest = TabletopEnv("push"), [], []
    for seed in range(600):
        env.reset(seed=seed)
        order = np.linalg.norm(env.scene.positions - env.scene.gripper, axis=-1).argsort()
        targets.append(env.episode_task.target)
        nearest.append(int(np.flatnonzero(order == env.episode_task.target)[0]))
    for choices in (targets, nearest):
        assert np.bincount(choices, minlength=3).min() > 150  # 200 expected, a standard deviation of 12


@both_tiers
def test_observation_holds_picture_and_gripper_only(tier: str):
    """Two scenes with the objects elsewhere differ in the picture and nowhere else."""
    env = TabletopEnv(tier)
    observation, info = env.reset(seed=3)
    env.scene.positions = env.scene.positions[::-1].copy()
    moved = env._observation()
    assert set(observation) == {"pixels", "agent_pos"}
    assert info == {"is_success": False}
    assert not np.array_equal(observation["pixels"], moved["pixels"])
    np.testing.assert_array_equal(observation["agent_pos"], moved["agent_pos"])
    np.testing.assert_array_equal(observation["agent_pos"], env.scene.gripper.astype(np.float32))


@both_tiers
def test_modes_share_scenes_and_tasks(tier: str):
    modes = {mode: TabletopEnv(tier, instructions=mode) for mode in ("true", "shuffled", "none")}
    for seed in range(40):
        pictures = [env.reset(seed=seed)[0]["pixels"] for env in modes.values()]
        np.testing.assert_array_equal(pictures[0], pictures[1])
        np.testing.assert_array_equal(pictures[0], pictures[2])
        tasks = {mode: env.episode_task for mode, env in modes.items()}
        assert len({(task.target, task.place) for task in tasks.values()}) == 1
        scene, shuffled = modes["shuffled"].scene, tasks["shuffled"]
        assert shuffled.spoken != shuffled.target
        assert scene.object_name(shuffled.spoken) in shuffled.instruction
        assert scene.object_name(shuffled.target) not in shuffled.instruction
        if shuffled.place is not None:
            assert shuffled.instruction.endswith(scene.place_name(shuffled.place))
        assert tasks["none"].instruction == ""


def test_shuffled_words_are_judged_by_the_original_task():
    env = TabletopEnv("reach", instructions="shuffled")
    for seed in range(20):
        env.reset(seed=seed)
        env.scene.gripper = env.scene.positions[env.episode_task.spoken].copy()
        _, reward, terminated, _, info = env.step(np.zeros(2))
        assert (reward, terminated, info["is_success"]) == (0.0, True, False)
        env.reset(seed=seed)
        env.scene.gripper = env.scene.positions[env.episode_task.target].copy()
        _, reward, terminated, _, info = env.step(np.zeros(2))
        assert (reward, terminated, info["is_success"]) == (1.0, True, True)


@pytest.mark.parametrize(("distance", "is_success"), [(0.99, True), (1.01, False)])
def test_reaching_succeeds_within_the_objects_radius(distance: float, is_success: bool):
    env = TabletopEnv("reach")
    env.reset(seed=0)
    env.scene.gripper = env.scene.positions[env.episode_task.target] + [0.0, distance * OBJECT_RADIUS]
    _, _, terminated, _, info = env.step(np.zeros(2))
    assert info["is_success"] == terminated == is_success


@pytest.mark.parametrize(("distance", "is_success"), [(0.99, True), (1.01, False)])
def test_pushing_succeeds_within_the_objects_radius(distance: float, is_success: bool):
    env = TabletopEnv("push")
    env.reset(seed=0)
    task = env.episode_task
    goal = env.scene.place_positions[task.place]
    env.scene.gripper = np.zeros(2)
    env.scene.positions[task.target] = goal - [0.0, np.sign(goal[1]) * distance * OBJECT_RADIUS]
    _, _, terminated, _, info = env.step(np.zeros(2))
    assert info["is_success"] == terminated == is_success


def test_pushing_another_object_into_the_corner_is_no_success():
    env = TabletopEnv("push")
    env.reset(seed=0)
    task = env.episode_task
    env.scene.positions[(task.target + 1) % 3] = env.scene.place_positions[task.place]
    _, _, terminated, _, info = env.step(np.zeros(2))
    assert not info["is_success"]
    assert not terminated


@both_tiers
def test_an_episode_that_goes_on_too_long_is_truncated(tier: str):
    env = TabletopEnv(tier, episode_length=4)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(False, True)]
    assert env._max_episode_steps == 4


def test_actions_are_deltas_in_units_of_the_largest_step():
    env = TabletopEnv("reach")
    env.reset(seed=1)
    start = env.scene.gripper.copy()
    env.step(np.array([0.5, -1.0]))
    np.testing.assert_allclose(env.scene.gripper - start, [0.5 * MAX_STEP, -MAX_STEP])
    env.step(np.array([7.0, 0.0]))  # clipped, not refused: a policy's output may overshoot
    np.testing.assert_allclose(env.scene.gripper - start, [1.5 * MAX_STEP, -MAX_STEP])


def test_varied_phrasing_says_the_same_in_other_words():
    env, fixed = TabletopEnv("reach", phrasing="varied"), TabletopEnv("reach")
    beginnings = set()
    for seed in range(40):
        env.reset(seed=seed)
        fixed.reset(seed=seed)
        assert env.task_description.split(" the ")[1] == fixed.task_description.removeprefix("reach the ")
        beginnings.add(env.task_description.split(" the ")[0])
    assert len(beginnings) == 4


def test_vectorised():
    vec = gym.make_vec("hlrp_tabletop/reach", num_envs=3, vectorization_mode="sync")
    observations, _ = vec.reset(seed=7)
    assert observations["pixels"].shape == (3, 96, 96, 3)
    for i in range(3):
        single, _ = TabletopEnv("reach").reset(seed=7 + i)
        np.testing.assert_array_equal(observations["pixels"][i], single["pixels"])
    infos = vec.step(np.stack(vec.call("expert_action")))[4]
    assert infos["is_success"].shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tier": "lift"}, "tier: expected one of reach, push, got 'lift'"),
        ({"instructions": "wrong"}, "instructions: expected one of true, shuffled, none"),
        ({"phrasing": "poetic"}, "phrasing: expected one of"),
        ({"num_objects": 2}, "num_objects: expected 3 to 6"),
        ({"tier": "push", "num_objects": 4}, "num_objects: expected 3 to 3 for tier 'push'"),
        ({"image_size": 4}, "image_size: expected at least"),
        ({"episode_length": 0}, "episode_length: expected at least"),
        ({"render_mode": "human"}, "render_mode: expected one of rgb_array"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, named: str):
    with pytest.raises(ValueError, match=named):
        TabletopEnv(**arguments)


@pytest.mark.parametrize("action", [np.zeros(3), np.array([np.nan, 0.0])])
def test_bad_actions_are_refused(action: np.ndarray):
    env = TabletopEnv("reach")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action: expected 2 finite numbers.*Next step: Pass one action"):
        env.step(action)


def test_stepping_before_reset_is_refused():
    with pytest.raises(gym.error.ResetNeeded):
        TabletopEnv("reach").step(np.zeros(2))


def test_needs_neither_lerobot_nor_torch():
    code = "import sys, hlrp_tabletop; assert not {'lerobot', 'torch', 'PIL'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
