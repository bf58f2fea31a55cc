"""`hlrp-record` as a command, in the tabletop and in Meta-World."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recording_helpers import load

from lerobot_hlrp.cli import record as record_cli
from lerobot_hlrp.recording.manifest import FIRST_RECORDING_SEED, Manifest


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
