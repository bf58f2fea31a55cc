"""Fixtures that several test folders share: a tiny backbone, tiny datasets, and `lerobot-train` in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

EPISODE_LENGTHS = (12, 9, 14, 10)
TASKS = ("reach the red disc", "push the blue cube")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a randomly initialised Qwen3-VL checkpoint."""
    from hlrp_core.backbones.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("backbone") / "tiny-qwen")


def write_dataset(root: Path, *, with_actions: bool = True, cameras: tuple[str, ...] = ("top",), seed: int = 0) -> Path:
    """A LeRobotDataset of four short episodes and two tasks. Actions and states grow with the episode's number."""
    import numpy as np
    from lerobot.datasets import LeRobotDataset

    features: dict = {
        f"observation.images.{name}": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
        for name in cameras
    }
    if with_actions:
        features["observation.state"] = {"dtype": "float32", "shape": (3,), "names": None}
        features["action"] = {"dtype": "float32", "shape": (2,), "names": None}
    dataset = LeRobotDataset.create("test/tiny", fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(seed)
    for episode, length in enumerate(EPISODE_LENGTHS):
        for _ in range(length):
            frame: dict = {
                f"observation.images.{name}": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in cameras
            }
            if with_actions:
                frame["observation.state"] = (rng.normal(size=3) + 10 * episode).astype(np.float32)
                frame["action"] = (rng.normal(size=2) * (1 + episode) + episode).astype(np.float32)
            dataset.add_frame({**frame, "task": TASKS[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dataset with one camera, state and actions."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dataset with one camera and nothing else: action-free video."""
    return write_dataset(tmp_path_factory.mktemp("data") / "videos", with_actions=False)


@pytest.fixture
def lerobot_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`lerobot-train` with these flags, in this process; returns the last checkpoint's `pretrained_model` folder."""

    def run(*flags: str, root: Path, steps: int = 2, output: str = "run", defaults: bool = True) -> Path:
        from lerobot.scripts.lerobot_train import train

        import lerobot_policy_hlrp  # noqa: F401

        folder = tmp_path / output
        usual = ["--batch_size=4", "--num_workers=0", "--log_freq=1", "--save_freq=100", "--wandb.enable=false"]
        usual += ["--policy.device=cpu", "--seed=7", "--policy.scheduler_warmup_steps=0"]
        usual += ["--dataset.repo_id=test/tiny", f"--dataset.root={root}", f"--output_dir={folder}"]
        argv = ["lerobot-train", *(usual if defaults else []), f"--steps={steps}", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        train()
        return folder / "checkpoints" / "last" / "pretrained_model"

    return run
