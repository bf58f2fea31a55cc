"""Which episodes supervise actions, and what a run without any label to learn from is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lerobot_hlrp.action_labels import SupervisionWatch
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

SMALL = ["--policy.action_head=prefix_flow", "--policy.action_expert.hidden_dim=32", "--policy.chunk_size=4"]
SMALL += ["--policy.action_expert.num_layers=1", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def flags(tiny_qwen: Path) -> list[str]:
    return ["--policy.type=hlrp_qwen", "--policy.mode=actions", f"--policy.backbone={tiny_qwen}", *SMALL]


def test_held_out_episodes_are_measured_whoever_supervises(flags, lerobot_train, tiny_dataset, tmp_path, capfd):
    split = ["--policy.action_episodes=[0]", "--dataset.eval_split=0.25", "--eval_steps=1"]
    lerobot_train(*flags, *split, root=tiny_dataset, output=tmp_path / "run")
    losses = [float(number) for number in re.findall(r"eval_loss=([0-9.]+)", "".join(capfd.readouterr()))]
    assert len(losses) == 2
    assert min(losses) > 0


def test_held_out_samples_without_actions_do_not_count(make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(mode="actions", action_head="mlp").eval()
    policy.reader.action_episodes = torch.tensor([99])
    batch = make_lerobot_batch()
    batch["action"][1] = float("nan")
    batch["observation.state"][1] = float("nan")
    batch["action"][0, -1] = float("nan")  # past the end of the episode: the sample still counts
    loss, _ = policy(batch)
    per_sample, _ = policy(batch, reduction="none")
    assert per_sample[1] == 0
    assert per_sample[0] > 0
    assert loss.item() == pytest.approx(per_sample[[0, 2]].mean().item(), rel=1e-5)
    assert loss > 0


def test_a_training_that_never_sees_the_chosen_episodes_stops(flags, lerobot_train, tiny_dataset, tmp_path):
    chosen = ["--policy.action_episodes=[3]", "--dataset.episodes=[0,1]"]
    with pytest.raises(ValueError, match=r"may supervise actions \(\[3\]\), got none among.*--dataset\.episodes"):
        lerobot_train(*flags, *chosen, root=tiny_dataset, output=tmp_path / "run", steps=60)


def test_patience_grows_as_labels_get_rarer():
    for length in (10, 1000):
        watch = SupervisionWatch([1], [1000 - length, length])
        for _ in range(20 * 1000 // length - 1):
            watch.see(torch.zeros(1, dtype=torch.bool))
        with pytest.raises(ValueError, match="none among the first"):
            watch.see(torch.zeros(1, dtype=torch.bool))


def test_one_sample_is_enough():
    watch = SupervisionWatch([1], [500, 500])
    watch.see(torch.tensor([False, True]))
    for _ in range(100):
        watch.see(torch.zeros(8, dtype=torch.bool))


def test_a_new_policy_without_labels_is_told_so_first(lerobot_train, tiny_videos, tmp_path):
    with pytest.raises(ValueError, match=r"labels for mode=codes.*--policy\.codes"):
        lerobot_train("--policy.type=hlrp_qwen", "--policy.backbone=nowhere", root=tiny_videos, output=tmp_path / "run")


def test_vectors_of_one_number(flags, lerobot_train, make_dataset, tmp_path):
    """LeRobot stores them as numbers, without an axis."""
    root = make_dataset(tmp_path / "data", state_dim=1, action_dim=1)
    folder = lerobot_train(*flags, root=root, output=tmp_path / "run")
    policy = HLRPQwenPolicy.from_pretrained(folder)
    images = {"observation.images.top": torch.rand(2, 3, 32, 32), "task": ["reach", "push"]}
    states = torch.randn(2, 1)
    for state in (states, states[:, 0], states[:, 0, None].expand(2, 3)):  # as an environment has it, stored, in time
        noise = torch.zeros(2, 4, 1)
        actions = policy.predict_action_chunk({**images, "observation.state": state}, noise)
        assert torch.equal(actions, policy.predict_action_chunk({**images, "observation.state": states}, noise))
        assert actions.shape == (2, 4, 1)


def test_the_backbones_precision_can_change_with_a_checkpoint(flags, lerobot_train, tiny_dataset, tmp_path):
    first = lerobot_train(*flags, root=tiny_dataset, output=tmp_path / "first", steps=1)
    half = ["--policy.backbone_dtype=bfloat16", "--policy.freeze_backbone=true"]
    second = lerobot_train(f"--policy.path={first}", *half, root=tiny_dataset, output=tmp_path / "second", steps=1)
    for folder, dtype in ((first, torch.float32), (second, torch.bfloat16)):
        assert HLRPQwenPolicy.from_pretrained(folder).backend.core.model.dtype == dtype


def test_real_time_chunking_from_the_command_line(make_tiny_policy):
    policy = make_tiny_policy(mode="actions", rtc_config={"enabled": True, "execution_horizon": 3})
    assert policy.rtc_processor is not None
    assert policy.config.rtc_config.execution_horizon == 3


def test_lerobot_eval_of_an_adapter_whose_head_has_the_laqs_vectors(
    lerobot_train, tiny_qwen, tabletop_dataset, tiny_laq, code_table, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    import sys

    from lerobot.scripts.lerobot_eval import main

    from hlrp_core.laq.quantizer import LatentActionQuantizer

    laq = LatentActionQuantizer.from_pretrained(tiny_laq)
    table = code_table(tabletop_dataset, laq_id="tiny-laq", laq_hash=laq.weights_hash())
    codes = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.codes={table}"]
    stage_two = lerobot_train(*codes, root=tabletop_dataset, output=tmp_path / "codes", steps=1)
    head = ["--policy.mode=actions", "--policy.action_head=laq", f"--policy.laq_weights={tiny_laq}", *SMALL[1:]]
    adapter = lerobot_train(
        f"--policy.path={stage_two}", *head, "--peft.r=4", root=tabletop_dataset, output=tmp_path / "run", steps=1
    )
    flags = [f"--policy.path={adapter}", "--policy.device=cpu", f"--output_dir={tmp_path / 'eval'}"]
    flags += ["--env.type=hlrp_tabletop", "--env.episode_length=3", "--eval.n_episodes=1", "--eval.batch_size=1"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *flags, "--eval.use_async_envs=false"])
    main()
    assert (tmp_path / "eval" / "eval_info.json").is_file()
