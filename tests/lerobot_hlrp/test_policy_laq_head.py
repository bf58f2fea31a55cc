"""`--policy.action_head=laq`: the LAQ's code vectors come from its folder once, and are saved with the policy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hlrp_core.bundle import load_backend
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def laq(tiny_laq: Path) -> LatentActionQuantizer:
    return LatentActionQuantizer.from_pretrained(tiny_laq)


@pytest.fixture(scope="module")
def table(code_table: Callable, tiny_dataset: Path, laq: LatentActionQuantizer) -> Path:
    return code_table(tiny_dataset, laq_id="tiny-laq", laq_hash=laq.weights_hash())


@pytest.fixture(scope="module")
def stage_two(lerobot_train, tiny_qwen, tiny_dataset, table, tmp_path_factory) -> Path:
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.codes={table}"]
    return lerobot_train(*flags, root=tiny_dataset, output=tmp_path_factory.mktemp("runs") / "codes")


@pytest.fixture(scope="module")
def stage_three(lerobot_train, stage_two, tiny_laq, tiny_dataset, tmp_path_factory) -> Path:
    """Trained with a LAQ whose folder is deleted afterwards."""
    copy = Path(shutil.copytree(tiny_laq, tmp_path_factory.mktemp("laq") / "soon-gone"))
    folder = lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=actions",
        "--policy.action_head=laq",
        f"--policy.laq={copy}",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path_factory.mktemp("runs") / "actions",
    )
    shutil.rmtree(copy)
    return folder


def test_the_policy_is_whole_without_the_laq(stage_three, laq, make_lerobot_batch):
    assert "soon-gone" not in (stage_three / "config.json").read_text().replace('"laq_id": "soon-gone"', "")
    policy = HLRPQwenPolicy.from_pretrained(stage_three)
    vectors = policy.backend.action_head.codes.vectors
    assert torch.equal(vectors, laq.code_vector_table())
    batch = make_lerobot_batch()
    actions = policy.predict_action_chunk(batch)
    assert actions.shape == (3, 4, 2)
    assert actions.isfinite().all()
    by_core = load_backend(stage_three).predict_action_chunk(policy.reader.read_observation(batch))
    assert torch.equal(by_core.actions, actions)
    assert by_core.latent.tokens.shape == (3, 4)


def test_training_goes_on_without_the_laq(lerobot_train, stage_three, laq, tiny_dataset, table, tmp_path):
    folder = lerobot_train(
        f"--policy.path={stage_three}",
        "--policy.mode=multitask",
        f"--policy.codes={table}",
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    again = HLRPQwenPolicy.from_pretrained(folder)
    assert torch.equal(again.backend.action_head.codes.vectors, laq.code_vector_table())


@pytest.mark.parametrize("conditioning", ["tokens", "soft"])
def test_beside_a_code_table_the_laq_is_named_of_its_own(
    conditioning, lerobot_train, tiny_qwen, tiny_laq, laq, tiny_dataset, table, tmp_path, make_lerobot_batch
):
    folder = lerobot_train(
        "--policy.type=hlrp_qwen",
        f"--policy.backbone={tiny_qwen}",
        "--policy.mode=multitask",
        "--policy.action_head=laq",
        f"--policy.codes={table}",
        f"--policy.laq_weights={tiny_laq}",
        "--policy.code_source=teacher",
        f"--policy.code_conditioning={conditioning}",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["laq_weights"], saved["laq_hash"]) == (None, laq.weights_hash())
    assert HLRPQwenPolicy.from_pretrained(folder).predict_action_chunk(make_lerobot_batch()).isfinite().all()


def test_sizes_come_from_the_laq_where_nothing_else_says_them(tiny_laq, laq, make_tiny_policy):
    policy = make_tiny_policy(
        mode="actions", action_head="laq", laq_weights=str(tiny_laq), codebook_size=None, code_seq_len=None
    )
    config = policy.config
    assert (config.codebook_size, config.code_seq_len, config.laq_id) == (8, 4, "tiny-laq")
    assert config.laq_hash == laq.weights_hash()


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_code_table_alone_does_not_do(lerobot_train, stage_two, tiny_dataset, table, tmp_path):
    flags = [f"--policy.path={stage_two}", "--policy.mode=multitask", "--policy.action_head=laq"]
    with pytest.raises(ValueError, match=r"LAQ for action_head=laq.*got a code table.*--policy\.laq_weights"):
        lerobot_train(*flags, f"--policy.codes={table}", root=tiny_dataset, output=tmp_path / "a")
    with pytest.raises(ValueError, match=r"LAQ for action_head=laq.*got None.*--policy\.laq_weights.*--policy\.laq"):
        lerobot_train(*flags[:1], "--policy.mode=actions", flags[2], root=tiny_dataset, output=tmp_path / "b")


def test_vectors_of_another_laq_are_refused(lerobot_train, stage_two, other_laq, tiny_dataset, tmp_path):
    flags = [f"--policy.path={stage_two}", "--policy.mode=actions", "--policy.action_head=laq"]
    for flag in ("laq_weights", "laq"):
        with pytest.raises(ValueError, match=r"laq_hash: expected .* as the policy's settings or its checkpoint"):
            lerobot_train(*flags, f"--policy.{flag}={other_laq}", root=tiny_dataset, output=tmp_path / flag)


def test_a_head_cannot_forget_its_laq(lerobot_train, stage_three, tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"laq_hash: expected .*whose code vectors the action head.*stage 2"):
        lerobot_train(
            f"--policy.path={stage_three}", "--policy.laq_hash=null", root=tiny_dataset, output=tmp_path / "run"
        )
