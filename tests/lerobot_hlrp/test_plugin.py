"""LeRobot finds the package by itself, and no command waits for it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_hlrp.registration import import_after

# Runs in a fresh process: what a LeRobot command does, with a stopwatch.
PROBE = """
import importlib, json, logging, sys, time
logging.disable(logging.CRITICAL)
command = importlib.import_module(sys.argv[1])
before = set(sys.modules)
start = time.perf_counter()
import lerobot_policy_hlrp
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before)}), flush=True)
if len(sys.argv) > 2:
    del sys.argv[1]
    command.main()
"""


def run_probe(*arguments: str) -> tuple[dict, str]:
    """The stopwatch's report, and what the command printed."""
    command = [sys.executable, "-c", PROBE, *arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report, _, rest = done.stdout.partition("\n")
    return json.loads(report), rest


def assert_cheap(report: dict) -> None:
    assert report["seconds"] < 0.5
    heavy = ("transformers", "torchvision", "datasets", "lerobot.policies", "hlrp_core.backbones")
    assert not [name for name in report["new"] if name.startswith(heavy)]


def test_lerobot_train_knows_the_policy_types_by_itself():
    flags = ["--help", "--policy.type=hlrp_qwen", "--env.type=hlrp_tabletop"]
    report, words = run_probe("lerobot.scripts.lerobot_train", *flags)
    assert_cheap(report)
    assert "--env.instructions" in words
    assert "--policy.action_episode_share" in words
    assert "What is learned" in words  # fields carry their help


def test_a_command_without_policies_pays_nothing():
    report, _ = run_probe("lerobot.scripts.lerobot_calibrate")
    assert_cheap(report)
    assert not [name for name in report["new"] if name.startswith("lerobot.")]


def test_the_module_that_lerobot_looks_for_imports_the_package():
    import lerobot_policy_hlrp

    assert lerobot_policy_hlrp.lerobot_hlrp.__name__ == "lerobot_hlrp"


def test_a_module_that_fails_does_not_break_the_one_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "hlrp_test_theirs.py").write_text("value = 1")
    (tmp_path / "hlrp_test_ours.py").write_text("import hlrp_test_not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    import_after("hlrp_test_theirs", "hlrp_test_ours")
    with caplog.at_level(logging.DEBUG):
        assert importlib.import_module("hlrp_test_theirs").value == 1
    assert not {"hlrp_test_ours", "hlrp_test_not_installed"} & set(sys.modules)
    error, traceback = caplog.records
    assert error.levelno == logging.ERROR
    assert "hlrp_test_ours" in error.getMessage()
    assert "ModuleNotFoundError: No module named 'hlrp_test_not_installed'" in error.getMessage()
    assert traceback.levelno == logging.DEBUG
    assert traceback.exc_info
    monkeypatch.delitem(sys.modules, "hlrp_test_theirs")
