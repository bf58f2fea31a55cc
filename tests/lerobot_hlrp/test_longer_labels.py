"""A LAQ of T = 3 frames through all commands: two transitions of S codes each make one label."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

from hlrp_core.laq.code_table import CodeTable
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.cli import eval_codes, label, laq_train
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.label_sources import open_label_source
from lerobot_hlrp.modeling_hlrp_qwen import HLRPQwenPolicy

GAP, SPAN = 2, 4
CAMERA = "observation.images.top"
SMALL_HEAD = ["--policy.action_expert.hidden_dim=32", "--policy.action_expert.num_layers=1"]
SMALL_HEAD += ["--policy.chunk_size=4", "--policy.n_action_steps=2"]


@pytest.fixture(scope="module")
def laq(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LAQ from hlrp-laq-train, K=8 and S=2 for each of two transitions."""
    folder = tmp_path_factory.mktemp("laq") / "laq"
    sizes = LAQConfig(num_frames=3, frame_gap=GAP, code_seq_len=2, image_size=16, hidden_dim=16, num_layers=1)
    dataset = DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset))
    running = {"steps": 4, "batch_size": 4, "log_freq": 2, "eval_share": 0.25}
    assert laq_train.train(laq_train.TrainLAQCommand(dataset=dataset, output_dir=folder, laq=sizes, **running)) == 0
    return folder


@pytest.fixture(scope="module")
def table(laq: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    dataset = DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset))
    assert label.label(label.LabelCommand(laq=str(laq), dataset=dataset, output=path, device="cpu")) == 0
    return path


@pytest.fixture(scope="module")
def stage_two(lerobot_train, tiny_qwen, tiny_dataset, table, tmp_path_factory) -> Path:
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.codes={table}"]
    return lerobot_train(*flags, root=tiny_dataset, output=tmp_path_factory.mktemp("runs") / "codes")


def test_a_table_has_what_the_laq_says_online(laq, table, tiny_dataset):
    codes = CodeTable.load(table)
    assert (codes.code_seq_len, codes.header.num_frames, codes.frame_gap) == (4, 3, GAP)
    meta = LeRobotDatasetMetadata("test/tiny", root=tiny_dataset)
    assert int(codes.valid.sum()) == meta.total_frames - SPAN * meta.total_episodes

    config = HLRPQwenConfig(laq=str(laq), camera=CAMERA)
    assert config.observation_delta_indices == [0, GAP, SPAN]
    online = open_label_source(config, meta)
    assert (config.code_seq_len, config.drop_n_last_frames) == (4, SPAN)
    offsets = {CAMERA: [step / meta.fps for step in config.observation_delta_indices]}
    dataset = LeRobotDataset("test/tiny", root=tiny_dataset, delta_timestamps=offsets)
    items = [dataset[i] for i in range(len(dataset))]
    batch = {key: torch.stack([item[key] for item in items]) for key in (CAMERA, f"{CAMERA}_is_pad")}
    frames = (batch[CAMERA] * 255).round().to(torch.uint8).movedim(-3, -1)  # (N, 3, H, W, 3)
    labels, valid = online.label(batch, frames)
    assert torch.equal(valid, codes.valid)
    assert torch.equal(labels[valid], codes.codes[codes.valid].long())


def test_a_table_teaches_and_measures(stage_two, laq, table, tiny_dataset, tmp_path):
    assert HLRPQwenPolicy.from_pretrained(stage_two).backend.code_seq_len == 4
    figures = []
    for labels in (f"--codes={table}", f"--laq={laq}"):
        output = tmp_path / "figures.json"
        flags = [f"--policy.path={stage_two}", "--dataset.repo_id=test/tiny", f"--dataset.root={tiny_dataset}"]
        run_command(eval_codes.EvalCodesCommand, eval_codes.evaluate, [*flags, labels, f"--output={output}"])
        figures.append(json.loads(output.read_text()))
    assert len(figures[0]["position_accuracy"]) == 4
    assert figures[0]["code_accuracy"] == pytest.approx(figures[1]["code_accuracy"])


def test_an_online_laq_teaches(lerobot_train, tiny_qwen, laq, tiny_dataset, tmp_path, capfd):
    flags = ["--policy.type=hlrp_qwen", f"--policy.backbone={tiny_qwen}", f"--policy.laq={laq}"]
    folder = lerobot_train(*flags, root=tiny_dataset, output=tmp_path / "run")
    assert "code_accuracy:" in capfd.readouterr().err
    assert json.loads((folder / "config.json").read_text())["label_span"] == SPAN


def test_actions_from_vectors_of_both_transitions(
    lerobot_train, stage_two, laq, table, tiny_dataset, tmp_path, make_lerobot_batch
):
    folder = lerobot_train(
        f"--policy.path={stage_two}",
        "--policy.mode=multitask",
        "--policy.action_head=laq",
        f"--policy.codes={table}",
        f"--policy.laq_weights={laq}",
        *SMALL_HEAD,
        root=tiny_dataset,
        output=tmp_path / "run",
    )
    policy = HLRPQwenPolicy.from_pretrained(folder)
    vectors = LatentActionQuantizer.from_pretrained(laq).code_vector_table()
    assert vectors.shape[:2] == (4, 8)
    assert torch.equal(policy.backend.action_head.codes.vectors, vectors)
    assert policy.predict_action_chunk(make_lerobot_batch()).isfinite().all()
