"""`hlrp_smolvlm` and `hlrp_smol_latent` with `lerobot-train`: codes, then actions, each saved and reloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class

from hlrp_core.bundle import load_backend
from hlrp_core.contract import BackendMode

TYPES = {
    "hlrp_smolvlm": ("smol_chat", []),
    "hlrp_smol_latent": ("smol_latent_head", ["--policy.latent_pooling=query"]),
}
SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def table(code_table: Callable) -> Callable[[Path], Path]:
    return cache(code_table)


@pytest.fixture(scope="module", params=TYPES)
def policy_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stage_two(
    policy_type: str,
    lerobot_train: Callable,
    tiny_backbone: Callable,
    tiny_videos: Path,
    table: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A policy of codes, trained on action-free video with a code table."""
    return lerobot_train(
        f"--policy.type={policy_type}",
        f"--policy.backbone={tiny_backbone('smolvlm')}",
        f"--policy.codes={table(tiny_videos)}",
        "--policy.image_size=32",
        *TYPES[policy_type][1],
        root=tiny_videos,
        output=tmp_path_factory.mktemp("runs") / "codes",
        steps=3,
    )


def load(folder: Path):
    return get_policy_class(PreTrainedConfig.from_pretrained(folder).type).from_pretrained(folder)


def test_what_was_trained_reloads_bit_equal(policy_type, stage_two, tmp_path, make_lerobot_batch):
    policy = load(stage_two)
    assert policy.config.type == policy_type
    assert policy.backend.name == json.loads((stage_two / "hlrp.json").read_text())["backend"]["name"]
    assert policy.backend.name == TYPES[policy_type][0]
    assert policy.backend.config.image_size == 32
    batch = make_lerobot_batch()
    expected = policy.predict_codes(batch).logits
    policy.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again.predict_codes(batch).logits, expected)
    core = load_backend(stage_two)  # without LeRobot
    got = core.latent_from_batch(policy.reader.read_observation(batch), mode=BackendMode.CODES)
    assert torch.equal(got.logits, expected)


@pytest.mark.parametrize(("head", "conditioning"), [("prefix_flow", "none"), ("mlp", "soft")])
def test_stage_three(head, conditioning, stage_two, lerobot_train, tiny_dataset, tmp_path, make_lerobot_batch):
    folder = lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=actions",
        f"--policy.action_head={head}",
        f"--policy.code_conditioning={conditioning}",
        "--policy.action_episodes=[0,1]",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    policy, again = load(folder), load(folder)
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    actions = policy.predict_action_chunk(batch, noise=noise)
    assert actions.shape == (3, 4, 2)
    assert torch.equal(again.predict_action_chunk(batch, noise=noise), actions)


def test_both_losses_at_once(stage_two, lerobot_train, tiny_dataset, table, tmp_path, capfd):
    lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=multitask",
        "--policy.action_head=prefix_flow",
        f"--policy.codes={table(tiny_dataset)}",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    log = capfd.readouterr().err
    for word in ("codes_loss:", "code_accuracy:", "constant_accuracy:", "actions_loss:"):
        assert word in log


def test_splitting_is_a_setting(make_tiny_policy, make_lerobot_batch):
    for is_split in (False, True):
        policy = make_tiny_policy("hlrp_smol_latent", "codes", image_splitting=is_split, image_size=16)
        inputs = policy.backend._prompt(policy.reader.read_observation(make_lerobot_batch()), for_prediction=True)
        assert inputs.images.layouts == [(4, 4) if is_split else (0, 0)] * 3
    with pytest.raises(ValueError, match=r"image_splitting.*qwen3_vl"):
        make_tiny_policy("hlrp_qwen", "codes", image_splitting=True)


def test_a_latent_head_on_the_other_family(make_tiny_policy, make_lerobot_batch, listed_labels):
    labels = listed_labels([[1, 2, 3, 4], [0, 7, 0, 7], [5, 5, 6, 6]])
    policy = make_tiny_policy("hlrp_qwen", "codes", labels, prompting="plain", code_head="latent")
    assert policy.backend.name == "qwen_latent_head"
    assert policy(make_lerobot_batch())[0].requires_grad
    with pytest.raises(ValueError, match="prompting=plain with code_head=latent"):
        make_tiny_policy("hlrp_qwen", "codes", code_head="latent")


def test_a_backbone_of_another_family_is_refused(make_tiny_policy, tiny_qwen):
    with pytest.raises(ValueError, match=r"smolvlm family.*got model_type 'qwen3_vl'"):
        make_tiny_policy("hlrp_smolvlm", "codes", backbone=str(tiny_qwen))
