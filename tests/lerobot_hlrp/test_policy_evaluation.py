"""Policies in an environment: `lerobot-eval`, and the evaluation inside `lerobot-train`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT = ["--env.type=hlrp_tabletop", "--env.episode_length=4", "--eval.use_async_envs=false"]
ENVIRONMENT += ["--eval.batch_size=2", "--eval.n_episodes=2"]


@pytest.fixture(scope="module")
def trained(lerobot_train: Callable, tiny_qwen: Path, tabletop_dataset: Path, tmp_path_factory) -> Path:
    """Trained in mixed precision with an evaluation after every step: nothing made there may break the next step."""
    return lerobot_train(
        "--policy.type=hlrp_qwen",
        "--policy.mode=actions",
        "--policy.action_head=prefix_flow",
        "--policy.code_conditioning=soft",
        "--policy.codebook_size=8",
        "--policy.code_seq_len=2",
        "--policy.action_expert.hidden_dim=32",
        "--policy.action_expert.num_layers=1",
        "--policy.dtype=bfloat16",
        f"--policy.backbone={tiny_qwen}",
        "--env_eval_freq=1",
        *ENVIRONMENT,
        root=tabletop_dataset,
        output=tmp_path_factory.mktemp("runs") / "run",
    )


def evaluate(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.scripts.lerobot_eval import main

    flags = [f"--policy.path={folder}", "--policy.device=cpu", f"--output_dir={output}", *ENVIRONMENT]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *flags])
    main()


def test_lerobot_eval_runs_a_trained_policy(trained, tmp_path, monkeypatch):
    evaluate(trained, tmp_path / "eval", monkeypatch)
    assert (tmp_path / "eval" / "eval_info.json").is_file()


def test_lerobot_eval_of_codes_alone_names_the_next_step(
    lerobot_train, trained, tabletop_dataset, code_table, tiny_qwen, tmp_path, monkeypatch
):
    folder = lerobot_train(
        "--policy.type=hlrp_qwen",
        f"--policy.backbone={tiny_qwen}",
        f"--policy.codes={code_table(tabletop_dataset)}",
        root=tabletop_dataset,
        output=tmp_path / "run",
        steps=1,
    )
    with pytest.raises(ValueError, match=r"--policy\.mode=actions --policy\.action_head"):
        evaluate(folder, tmp_path / "eval", monkeypatch)
