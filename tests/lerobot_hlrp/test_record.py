"""`hlrp-record`: what is in the dataset, refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.io_utils import load_stats
from lerobot.envs.configs import PushtEnv
from recording_helpers import IMAGE_SIZE, assert_same_dataset, load, make_plan

from hlrp_tabletop import TabletopEnv
from lerobot_hlrp.recording import session
from lerobot_hlrp.recording.episode import record_episode
from lerobot_hlrp.recording.manifest import FIRST_RECORDING_SEED, MANIFEST_PATH
from lerobot_hlrp.recording.segment_writer import SegmentWriter
from lerobot_hlrp.recording.session import record
from lerobot_hlrp.recording.sources import make_source

LEROBOT_COLUMNS = {"timestamp", "frame_index", "episode_index", "index", "task_index", "task"}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments in a few episodes."""
    monkeypatch.setattr(session, "SegmentWriter", partial(SegmentWriter, segment_frames=20))


# -- what is recorded -----------------------------------------------------------------------------------------------


def test_frames_are_the_environments_bit_for_bit(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", task="reach,push", seed=40)
    manifest, is_complete = record(plan, source)
    assert is_complete
    dataset = load(plan.root)
    assert set(dataset[0]) == {"observation.image", "observation.state", "action"} | LEROBOT_COLUMNS
    index = 0
    for episode in range(8):
        env = TabletopEnv(("reach", "push")[episode % 2], image_size=IMAGE_SIZE)
        observation, _ = env.reset(seed=manifest.episode_seeds[episode])
        is_over = False
        while not is_over:
            item, action = dataset[index], env.expert_action()
            pixels = (item["observation.image"] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, observation["pixels"])
            np.testing.assert_array_equal(item["observation.state"], observation["agent_pos"])
            np.testing.assert_array_equal(item["action"], action)
            assert item["task"] == env.task_description
            assert item["episode_index"] == episode
            observation, _, terminated, truncated, _ = env.step(action)
            is_over, index = terminated or truncated, index + 1
    assert index == len(dataset) == manifest.num_frames
    assert dataset.num_episodes == 8
    assert dataset.fps == 10


def test_same_content_as_lerobots_own_writer(tmp_path: Path):
    """LeRobot's writer is the slow, obvious twin."""
    plan, source = make_plan(tmp_path / "ours")
    manifest, _ = record(plan, source)
    features = {
        key: value for key, value in plan.layout.features().items() if key.split(".")[0] in ("observation", "action")
    }
    twin = LeRobotDataset.create(
        "local/test", fps=10, features=features, root=tmp_path / "theirs", robot_type="hlrp_tabletop", use_videos=False
    )
    for seed in manifest.episode_seeds:
        episode = record_episode(source.envs[0], seed, 0.0, lambda: False)
        for image, state, action in zip(episode.images, episode.states, episode.actions, strict=True):
            frame = {"observation.image": image, "observation.state": state, "action": action, "task": episode.task}
            twin.add_frame(frame)
        twin.save_episode()
    twin.finalize()
    assert_same_dataset(tmp_path / "ours", tmp_path / "theirs")
    infos = [json.loads((tmp_path / name / "meta/info.json").read_text()) for name in ("ours", "theirs")]
    assert infos[0] == infos[1]
    schemas = [load(tmp_path / name).hf_dataset.features for name in ("ours", "theirs")]
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize("column", ["action", "observation.state"])
def test_columns_can_be_left_out(tmp_path: Path, column: str):
    without = {"with_actions": False} if column == "action" else {"with_state": False}
    plan, source = make_plan(tmp_path / "set", episodes=3, **without)
    record(plan, source)
    dataset = load(plan.root)
    expected = {"observation.image", "observation.state", "action"} - {column}
    assert set(dataset[0]) == expected | LEROBOT_COLUMNS
    assert column not in dataset.meta.features
    assert column not in (load_stats(plan.root) or {})


def test_video(tmp_path: Path):
    """Frames come back in place, over several video files; the encoder may change them a little."""
    exact_plan, source = make_plan(tmp_path / "images", episodes=6)
    record(exact_plan, source)
    plan, source = make_plan(tmp_path / "video", episodes=6, use_video=True)
    record(plan, source)
    assert len(list((plan.root / "videos").rglob("*.mp4"))) >= 2
    exact, videos = load(exact_plan.root), load(plan.root)
    assert videos.meta.video_keys == ["observation.image"]
    assert len(videos) == len(exact)
    for index in range(len(exact)):
        ours, theirs = videos[index]["observation.image"], exact[index]["observation.image"]
        assert (ours - theirs).abs().mean() < 0.03
        assert videos[index]["task"] == exact[index]["task"]
    assert not (plan.root / ".recording").exists()


def test_noise_disturbs_what_is_executed_and_not_what_is_recorded():
    env, settings = TabletopEnv("reach"), (FIRST_RECORDING_SEED, 0.5, lambda: False)
    noisy, again = record_episode(env, *settings), record_episode(env, *settings)
    np.testing.assert_array_equal(noisy.states, again.states)
    env.reset(seed=FIRST_RECORDING_SEED)
    for state, action in zip(noisy.states, noisy.actions, strict=True):
        env.scene.gripper = state.astype(np.float64)
        np.testing.assert_allclose(action, env.expert_action(), atol=1e-5)
    moves = np.diff(noisy.states, axis=0) / 0.1
    assert np.abs(moves - noisy.actions[:-1]).max() > 0.1


def test_failures_are_dropped_and_counted_or_kept(tmp_path: Path):
    plan, source = make_plan(tmp_path / "dropped", episode_length=7)
    manifest, _ = record(plan, source)
    assert manifest.failed_seeds
    assert set(manifest.failed_seeds).isdisjoint(manifest.episode_seeds)
    used = sorted(manifest.failed_seeds + manifest.episode_seeds)
    assert used == list(range(manifest.first_seed, manifest.next_seed))
    plan, source = make_plan(tmp_path / "kept", episode_length=7, keep_failures=True)
    kept, _ = record(plan, source)
    assert kept.episode_seeds == list(range(FIRST_RECORDING_SEED, FIRST_RECORDING_SEED + 8))
    assert set(kept.failed_seeds) <= set(kept.episode_seeds)


def test_manifest_says_where_the_scenes_come_from(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=4, seed=7, noise=0.1)
    record(plan, source)
    content = json.loads((plan.root / MANIFEST_PATH).read_text())
    assert content["episode_seeds"] == [FIRST_RECORDING_SEED + 7 + i for i in range(4)]
    assert (content["first_seed"], content["next_seed"]) == (FIRST_RECORDING_SEED + 7, FIRST_RECORDING_SEED + 11)
    assert content["is_complete"] is True
    expected = {
        "env": "hlrp_tabletop",
        "tasks": ["reach"],
        "seed": 7,
        "noise": 0.1,
        "fps": 10,
        "image_size": IMAGE_SIZE,
    }
    assert expected.items() <= content["settings"].items()


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["state", "action"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch):
    plan, source = make_plan(tmp_path / "set")
    env, bad_seed = source.envs[0], FIRST_RECORDING_SEED + 4
    assert isinstance(env, TabletopEnv)
    original_reset, original_action, seeds = env.reset, env.expert_action, []

    def reset(*, seed: int):
        seeds.append(seed)
        observation, info = original_reset(seed=seed)
        if broken == "state" and seed == bad_seed:
            observation["agent_pos"] = np.array([np.inf, 0.0])
        return observation, info

    def expert_action():
        return np.array([0.0, np.nan]) if broken == "action" and seeds[-1] == bad_seed else original_action()

    monkeypatch.setattr(env, "reset", reset)
    monkeypatch.setattr(env, "expert_action", expert_action)
    with pytest.raises(ValueError, match=rf"{broken} at step 0 .*{bad_seed}: expected finite numbers, got"):
        record(plan, source)
    assert load(plan.root).num_episodes == 4  # what came before is kept


def test_an_expert_that_keeps_failing_ends_the_recording(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episode_length=1)
    with pytest.raises(ValueError, match="failed 50 times in a row"):
        record(plan, source)


def test_a_folder_with_something_else_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    plan, source = make_plan(tmp_path)
    with pytest.raises(ValueError, match=r"expected a new folder, or one that hlrp-record began"):
        record(plan, source)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "mine").write_text("precious")
    for root in (tmp_path / "mine", tmp_path / "mine" / "set"):
        plan, source = make_plan(root)
        with pytest.raises(ValueError, match=r"--dataset\.root: expected a folder.*mine.*Next step"):
            record(plan, source)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"noise": 0.2}, {"task": "push"}, {"with_actions": False}, {"keep_failures": True}]
)
def test_other_settings_are_refused(tmp_path: Path, other: dict):
    plan, source = make_plan(tmp_path / "set", episodes=2)
    record(plan, source)
    plan, source = make_plan(tmp_path / "set", episodes=4, **other)
    with pytest.raises(ValueError, match=f"{'tasks' if 'task' in other else next(iter(other))}: expected .*, got"):
        record(plan, source)


def test_fewer_episodes_are_refused(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=3)
    record(plan, source)
    plan, source = make_plan(tmp_path / "set", episodes=2)
    with pytest.raises(ValueError, match="--episodes: expected at least the 3"):
        record(plan, source)


@pytest.mark.parametrize(("setting", "named"), [("episodes", "--episodes"), ("seed", "--seed"), ("noise", "--noise")])
def test_bad_numbers_are_refused(tmp_path: Path, setting: str, named: str):
    with pytest.raises(ValueError, match=f"{named}: expected .*Next step"):
        make_plan(tmp_path, **{setting: -1})


def test_environments_without_an_expert_are_refused():
    expected = r"expected an environment with a scripted expert \(hlrp_tabletop.*got 'pusht'\. Next step"
    with pytest.raises(ValueError, match=expected):
        make_source(PushtEnv())
