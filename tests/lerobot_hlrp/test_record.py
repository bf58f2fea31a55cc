"""`hlrp-record`: what is in the dataset, interruptions, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.io_utils import load_stats
from lerobot.envs.configs import PushtEnv

from hlrp_tabletop import TabletopEnv
from lerobot_hlrp.cli import record as record_cli
from lerobot_hlrp.envs import TabletopEnvConfig
from lerobot_hlrp.recording import session
from lerobot_hlrp.recording.episode import record_episode
from lerobot_hlrp.recording.layout import DatasetLayout
from lerobot_hlrp.recording.manifest import FIRST_RECORDING_SEED, MANIFEST_PATH, Manifest
from lerobot_hlrp.recording.segment_writer import SegmentWriter
from lerobot_hlrp.recording.session import RecordingPlan, record
from lerobot_hlrp.recording.sources import Source, make_source

IMAGE_SIZE = 32
LEROBOT_COLUMNS = {"timestamp", "frame_index", "episode_index", "index", "task_index", "task"}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments in a few episodes."""
    monkeypatch.setattr(session, "SegmentWriter", partial(SegmentWriter, segment_frames=20))


def make_plan(root: Path, episodes: int = 8, **settings) -> tuple[RecordingPlan, Source]:
    env_settings = {name: settings.pop(name) for name in ("task", "episode_length") if name in settings}
    source = make_source(TabletopEnvConfig(image_size=IMAGE_SIZE, **env_settings))
    layout = DatasetLayout(
        robot_type=source.name,
        fps=source.fps,
        image_shape=source.image_shape,
        state_names=source.state_names if settings.pop("with_state", True) else (),
        action_names=source.action_names if settings.pop("with_actions", True) else (),
        use_video=settings.pop("use_video", False),
    )
    return RecordingPlan(root=root, layout=layout, num_episodes=episodes, **settings), source


def load(root: Path) -> LeRobotDataset:
    return LeRobotDataset("local/test", root=root)


def assert_same_dataset(one: Path, other: Path) -> None:
    """Every item, the episodes table (but for the file numbers), the statistics and the manifest."""
    first, second = load(one), load(other)
    assert len(first) == len(second)
    for index in range(len(first)):
        assert_same_item(first[index], second[index])
    tables = [
        pd.concat(map(pd.read_parquet, sorted((root / "meta/episodes").rglob("*.parquet")))) for root in (one, other)
    ]
    for table in tables:
        table.drop(columns=[name for name in table if name.endswith("_index") and "/" in name], inplace=True)
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))
    assert_same_statistics(one, other)
    pd.testing.assert_frame_equal(first.meta.tasks, second.meta.tasks)


def assert_same_item(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], rtol=0, atol=0)
        else:
            assert value == other[key]


def assert_same_statistics(one: Path, other: Path) -> None:
    first, second = load_stats(one), load_stats(other)
    assert first is not None
    assert second is not None
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert values.keys() == second[key].keys()
        for name, value in values.items():
            np.testing.assert_allclose(value, second[key][name], rtol=1e-6, err_msg=f"{key} {name}")


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


# -- interruptions --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands in for a kill: nothing in the program may catch it."""


def kill_in_the_middle_of_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the second segment are written but the manifest is not."""
    original, calls = Manifest.save, []

    def save(manifest: Manifest, root: Path) -> None:
        calls.append(manifest.num_segments)
        if manifest.num_segments == 2:
            raise Killed
        original(manifest, root)

    monkeypatch.setattr(Manifest, "save", save)


def kill_while_writing_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment's data file stays half written."""
    original = SegmentWriter._write_segment

    def write(writer: SegmentWriter, segment: int) -> None:
        if segment == 1:
            (writer.root / "data/chunk-000/file-001.parquet.partial").write_bytes(b"PAR1 half")
            raise Killed
        original(writer, segment)

    monkeypatch.setattr(SegmentWriter, "_write_segment", write)


def kill_between_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment is there, the statistics and counts are those of the first."""

    def write(writer: SegmentWriter) -> None:
        if writer.manifest.num_segments == 2:
            raise Killed
        original(writer)

    original = SegmentWriter._write_metadata
    monkeypatch.setattr(SegmentWriter, "_write_metadata", write)


@pytest.mark.parametrize(
    ("kill", "use_video"),
    [
        (kill_in_the_middle_of_a_commit, False),
        (kill_in_the_middle_of_a_commit, True),
        (kill_while_writing_a_file, False),
        (kill_between_files, False),
    ],
)
def test_a_killed_recording_goes_on_as_if_nothing_had_happened(tmp_path: Path, kill: Callable, use_video: bool):
    whole, source = make_plan(tmp_path / "whole", episodes=10, use_video=use_video)
    record(whole, source)
    plan, source = make_plan(tmp_path / "killed", episodes=10, use_video=use_video)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            record(plan, source)
    SegmentWriter(plan.root, plan.layout, Manifest.load(plan.root))  # the next run, dying before its first episode
    first_segment = Manifest.load(plan.root)
    assert first_segment.num_segments == 1
    files = {path.name for folder in ("data", "meta/episodes") for path in (plan.root / folder).rglob("*.parquet*")}
    assert files == {"file-000.parquet"}
    assert (len(load(plan.root)), load(plan.root).num_episodes) == (
        first_segment.num_frames,
        first_segment.num_episodes,
    )
    manifest, is_complete = record(plan, source)
    assert is_complete
    assert_same_dataset(whole.root, plan.root)
    assert manifest == Manifest.load(whole.root)
    leftovers = [path for path in plan.root.rglob("*") if path.suffix == ".partial" or path.name == ".recording"]
    assert leftovers == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_whole_episodes(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    whole, source = make_plan(tmp_path / "whole", task="reach,push", episodes=10)
    record(whole, source)
    plan, source = make_plan(tmp_path / "stopped", task="reach,push", episodes=10)
    original, steps = TabletopEnv.step, []

    def step(env: TabletopEnv, action: np.ndarray):
        steps.append(env)
        if len(steps) == 70:
            os.kill(os.getpid(), number)
        return original(env, action)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TabletopEnv, "step", step)
        manifest, is_complete = record(plan, source)
    assert not is_complete
    assert signal.getsignal(number) is before
    assert 0 < manifest.num_episodes < 10
    partial_dataset = load(plan.root)  # it can be used as it is
    assert partial_dataset.num_episodes == manifest.num_episodes
    assert manifest.num_frames <= 70 < manifest.num_frames + 60
    _, is_complete = record(plan, source)
    assert is_complete
    assert_same_dataset(whole.root, plan.root)


def test_a_second_signal_ends_it_at_once(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=10)
    original, steps = TabletopEnv.step, []

    def step(env: TabletopEnv, action: np.ndarray):
        steps.append(env)
        if len(steps) == 70:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(env, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TabletopEnv, "step", step)
        with pytest.raises(KeyboardInterrupt):
            record(plan, source)
    assert len(steps) == 70
    _, is_complete = record(plan, source)
    assert is_complete
    assert load(plan.root).num_episodes == 10


def test_more_episodes_are_added_to_a_finished_recording(tmp_path: Path):
    whole, source = make_plan(tmp_path / "whole", episodes=9)
    record(whole, source)
    for episodes in (5, 9):
        plan, source = make_plan(tmp_path / "grown", episodes=episodes)
        record(plan, source)
    assert_same_dataset(whole.root, tmp_path / "grown")


def test_a_finished_recording_is_left_alone(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=3)
    record(plan, source)
    times = {path: path.stat().st_mtime_ns for path in plan.root.rglob("*")}
    _, is_complete = record(plan, source)
    assert is_complete
    assert times == {path: path.stat().st_mtime_ns for path in plan.root.rglob("*")}


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


# -- the command ----------------------------------------------------------------------------------------------------


def run_command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Exit status of `hlrp-record` with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", ["hlrp-record", *flags])
    try:
        record_cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    root = tmp_path / "set"
    flags = ["--env.type=hlrp_tabletop", "--env.task=reach", "--env.image_size=32", f"--dataset.root={root}"]
    flags += ["--dataset.repo_id=local/reach", "--episodes=4", "--with_actions=false", "--dataset.fps=5"]
    assert run_command(monkeypatch, *flags) == 0
    assert f"4 episodes, {len(load(root))} frames" in capsys.readouterr().out
    dataset = load(root)
    assert dataset.fps == 5
    assert "action" not in dataset.meta.features
    flags[1] = "--env.task=push"
    assert run_command(monkeypatch, *flags) == 1
    assert "was begun with other settings (tasks: expected ['reach'], got ['push'])" in capsys.readouterr().err


def test_command_puts_datasets_where_lerobot_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record_cli, "HF_LEROBOT_HOME", tmp_path)
    flags = ["--env.type=hlrp_tabletop", "--env.image_size=32", "--dataset.repo_id=local/reach", "--episodes=2"]
    assert run_command(monkeypatch, *flags) == 0
    assert load(tmp_path / "local" / "reach").num_episodes == 2


@pytest.mark.parametrize("flag", ["--env.task=raech", "--env.task=push,raech"])
def test_command_offers_the_closest_task(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    assert run_command(monkeypatch, "--env.type=hlrp_tabletop", flag, "--dataset.repo_id=local/reach") == 1
    printed = capsys.readouterr().err
    assert "--env.task: expected one of reach, push, got 'raech'. Next step: " in printed
    assert "Did you mean 'reach'?" in printed


def test_command_refuses_shuffled_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    flags = ["--env.type=hlrp_tabletop", "--env.instructions=shuffled", "--dataset.repo_id=local/reach"]
    assert run_command(monkeypatch, *flags, f"--dataset.root={tmp_path / 'set'}") == 1
    assert "--env.instructions: expected true or none" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_metaworld(tmp_path: Path):
    """In a process of its own: a second Meta-World environment in one process may render black."""
    root = tmp_path / "set"
    command = [sys.executable, "-m", "lerobot_hlrp.cli.record", "--env.type=metaworld", "--env.task=reach-v3"]
    command += ["--dataset.repo_id=local/mw", f"--dataset.root={root}", "--episodes=1", "--dataset.video=false"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if errors and "Meta-World" in errors[0]:  # no OpenGL, or a MuJoCo that does not fit
        pytest.skip(errors[0])
    assert result.returncode == 0, result.stderr
    dataset = load(root)
    assert dataset.num_episodes == 1
    item = dataset[0]
    assert item["task"] == "Reach a goal position"
    assert item["observation.image"].shape == (3, 480, 480)
    assert 0.2 < item["observation.image"].mean() < 0.8  # neither black nor white
    assert item["observation.state"].shape == item["action"].shape == (4,)
    assert item["action"].abs().max() <= 1
    assert Manifest.load(root).episode_seeds == [FIRST_RECORDING_SEED]
