"""The whole way with `lerobot-train`: codes, then actions from few labels, both at once, resumed, fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_policy, make_pre_post_processors
from safetensors.torch import load_file

from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

NORMALIZER = "policy_preprocessor_step_3_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def table(code_table: Callable) -> Callable[[Path], Path]:
    return cache(code_table)


@pytest.fixture(scope="module")
def stage_two(lerobot_train: Callable, tiny_qwen: Path, tiny_videos: Path, table: Callable, runs: Path) -> Path:
    """A policy of codes, trained on action-free video with a code table."""
    flags = ["--policy.type=hlrp_qwen", "--policy.mode=codes", f"--policy.backbone={tiny_qwen}"]
    return lerobot_train(*flags, f"--policy.codes={table(tiny_videos)}", root=tiny_videos, output=runs / "codes")


def expected_statistics(root: Path, episodes: list[int], key: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = LeRobotDataset("test/tiny", root=root, episodes=episodes)
    values = np.stack([np.asarray(value) for value in dataset.hf_dataset[key]])
    return values.mean(0), values.std(0)


def assert_statistics_of(folder: Path, root: Path, episodes: list[int]) -> None:
    for file in (NORMALIZER, UNNORMALIZER):
        saved = load_file(folder / file)
        for key in ("action", "observation.state"):
            mean, std = expected_statistics(root, episodes, key)
            np.testing.assert_allclose(saved[f"{key}.mean"], mean, rtol=1e-4)
            np.testing.assert_allclose(saved[f"{key}.std"], std, rtol=1e-4)


def test_stage_two_reports_accuracy_beside_the_constant_prediction(
    lerobot_train, tiny_qwen, tiny_dataset, table, tmp_path, capfd
):
    folder = lerobot_train(
        "--policy.type=hlrp_qwen",
        "--policy.prompting=plain",
        f"--policy.backbone={tiny_qwen}",
        f"--policy.codes={table(tiny_dataset)}",
        "--dataset.eval_split=0.25",
        "--eval_steps=1",
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    log = capfd.readouterr().err
    for word in ("codes_loss:", "code_accuracy:", "constant_accuracy:", "eval_loss="):
        assert word in log
    saved = (folder / "config.json").read_text()
    assert str(table(tiny_dataset)) not in saved
    assert str(table(tiny_dataset)) in (folder / "train_config.json").read_text()  # for resuming
    manifest = json.loads((folder / "hlrp.json").read_text())
    assert manifest["extra"]["laq"]["hash"] == json.loads(saved)["laq_hash"]
    assert manifest["extra"]["laq"]["hash"] is not None


@pytest.mark.parametrize("head", ["mlp", "flow", "prefix_flow"])
def test_stage_three_from_a_stage_two_without_actions(head, lerobot_train, stage_two, tiny_dataset, tmp_path):
    """The stage-2 data had neither actions nor state; here few episodes have labels, and only they are measured."""
    folder = lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=actions",
        f"--policy.action_head={head}",
        "--policy.action_episodes=[0,1]",
        "--policy.dtype=bfloat16",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    assert_statistics_of(folder, tiny_dataset, [0, 1])
    policy = HLRPQwenPolicy.from_pretrained(folder)
    assert policy.reader.state_dim == 3
    assert json.loads((folder / "hlrp.json").read_text())["extra"]["action_episodes"] == [0, 1]

    preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    observation = {
        "observation.images.top": torch.rand(2, 3, 32, 32),
        "observation.state": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "task": ["reach the red disc", ""],
    }
    with torch.inference_mode():
        action = policy.select_action(preprocess(observation))
    mean, std = (torch.tensor(x) for x in expected_statistics(tiny_dataset, [0, 1], "action"))
    torch.testing.assert_close(postprocess(action), action * std + mean, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def multitask(lerobot_train: Callable, stage_two: Path, tiny_dataset: Path, table: Callable, runs: Path) -> Path:
    return lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=multitask",
        "--policy.action_head=prefix_flow",
        f"--policy.codes={table(tiny_dataset)}",
        "--policy.action_episode_share=0.5",
        "--policy.action_episode_seed=3",
        "--policy.backbone_lr_multiplier=0.1",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=runs / "multitask",
    )


def test_codes_of_an_online_teacher(lerobot_train, tiny_qwen, tiny_laq, tiny_videos, table, tmp_path, capfd):
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.laq={tiny_laq}"]
    folder = lerobot_train(*flags, root=tiny_videos, output=tmp_path / "run")
    assert "code_accuracy:" in capfd.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    assert (config["laq"], config["laq_id"], config["frame_gap"], config["codebook_size"]) == (None, "tiny-laq", 3, 8)
    with pytest.raises(ValueError, match=r"laq_hash: expected .* got hash-of-a-laq"):
        lerobot_train(
            f"--policy.path={folder}",
            f"--policy.codes={table(tiny_videos)}",  # of another LAQ: its codes mean other things
            root=tiny_videos,
            output=tmp_path / "other",
        )


def chosen_episodes(folder: Path) -> list[int]:
    return json.loads((folder / "hlrp.json").read_text())["extra"]["action_episodes"]


def test_both_losses_at_once(multitask, tiny_dataset):
    assert len(chosen_episodes(multitask)) == 2
    assert_statistics_of(multitask, tiny_dataset, chosen_episodes(multitask))
    config = json.loads((multitask / "config.json").read_text())
    assert config["action_episode_share"] is None  # the choice of a run is not the policy's


def test_resuming_goes_on_as_before(lerobot_train, multitask, tiny_dataset, capfd):
    before = chosen_episodes(multitask)
    flags = [f"--config_path={multitask.resolve() / 'train_config.json'}", "--resume=true"]
    folder = lerobot_train(*flags, output=multitask.parents[2], steps=3)
    assert folder.resolve().parent.name == "000003"
    log = capfd.readouterr().err
    assert "step:3 " in log
    assert "step:2 " not in log
    assert chosen_episodes(folder) == before
    assert_statistics_of(folder, tiny_dataset, before)


def test_fine_tuning_takes_the_statistics_of_the_new_run(lerobot_train, multitask, tiny_dataset, tmp_path):
    folder = lerobot_train(
        f"--policy.path={multitask}",
        "--policy.mode=actions",
        "--policy.action_episodes=[2]",
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    assert_statistics_of(folder, tiny_dataset, [2])


def test_actions_without_any_stage_two(lerobot_train, tiny_qwen, tiny_dataset, tmp_path):
    flags = ["--policy.type=hlrp_qwen", "--policy.mode=actions", "--policy.action_head=prefix_flow"]
    folder = lerobot_train(
        *flags, f"--policy.backbone={tiny_qwen}", *SMALL_HEAD, root=tiny_dataset, output=tmp_path / "run"
    )
    assert_statistics_of(folder, tiny_dataset, [0, 1, 2, 3])


def test_a_policy_with_actions_can_go_on_with_codes_of_video(lerobot_train, multitask, tiny_videos, table, tmp_path):
    folder = lerobot_train(
        f"--policy.path={multitask}",
        "--policy.mode=codes",
        f"--policy.codes={table(tiny_videos)}",
        root=tiny_videos,
        output=tmp_path / "run",
    )
    assert HLRPQwenPolicy.from_pretrained(folder).backend.action_head is not None


def test_low_rank_adapters_carry_head_and_code_tokens(lerobot_train, multitask, tiny_dataset, table, tmp_path):
    peft = pytest.importorskip("peft")
    folder = lerobot_train(
        f"--policy.path={multitask}",
        f"--policy.codes={table(tiny_dataset)}",
        "--peft.r=4",
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    names = "\n".join(load_file(folder / "adapter_model.safetensors"))
    for word in ("language_model.layers.0.self_attn.q_proj.lora_A", "action_head.expert", "embed_tokens", "lm_head"):
        assert word in names
    assert "visual" not in names

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("test/tiny", root=tiny_dataset))
    assert isinstance(policy, peft.PeftModel)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_actions_need_a_dataset_with_actions(lerobot_train, stage_two, tiny_videos, tmp_path):
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", "--policy.action_head=flow"]
    with pytest.raises(ValueError, match=r"'action' column.*Use a dataset with actions"):
        lerobot_train(*flags, root=tiny_videos, output=tmp_path / "run")


def test_a_checkpoint_keeps_its_backbone(lerobot_train, stage_two, tiny_videos, table, tmp_path):
    flags = [f"--policy.path={stage_two}", f"--policy.codes={table(tiny_videos)}", "--policy.backbone=other/model"]
    with pytest.raises(ValueError, match=r"tiny-qwen.*other/model"):
        lerobot_train(*flags, root=tiny_videos, output=tmp_path / "run")


def test_codes_need_labels(lerobot_train, stage_two, tiny_videos, tmp_path):
    with pytest.raises(ValueError, match=r"--policy\.codes.*--policy\.laq"):
        lerobot_train(f"--policy.path={stage_two}", root=tiny_videos, output=tmp_path / "run")
