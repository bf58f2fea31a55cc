"""Δ in seconds: the frames of a dataset, labels, and what a checkpoint compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

from hlrp_core.laq.code_table import CodeTable
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.cli import label, laq_train
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.code_vectors import read_code_vectors
from lerobot_hlrp.configuration_hlrp_qwen import HLRPQwenConfig
from lerobot_hlrp.frame_gap import frames_apart
from lerobot_hlrp.label_sources import open_label_source

CAMERA = "observation.images.top"


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"), [(0.3, 10, 3), (0.3, 20, 6), (0.1, 30, 3), (0.333, 30, 10), (1, 1, 1), (0.02, 50, 1)]
)
def test_whole_frames(seconds, fps, frames):
    assert frames_apart(seconds, fps, "data") == frames


@pytest.mark.parametrize(
    ("seconds", "fps", "next_step"),
    [(0.33, 30, "Use 0.3 or 0.333333 s"), (0.25, 10, "Use 0.2 or 0.3 s"), (0.01, 10, "Use 0.1 s"), (0, 10, "0.1 s")],
)
def test_no_whole_frames(seconds, fps, next_step):
    with pytest.raises(ValueError, match=f"frame_gap_s: expected a whole number of frames.*data.*{next_step}"):
        frames_apart(seconds, fps, "data")


def test_labels_of_another_gap_than_the_laqs(tiny_laq: Path, tiny_dataset: Path, tmp_path: Path):
    table_path = tmp_path / "codes.safetensors"
    flags = [f"--laq={tiny_laq}", "--dataset.repo_id=test/tiny", f"--dataset.root={tiny_dataset}", "--device=cpu"]
    run_command(label.LabelCommand, label.label, [*flags, f"--output={table_path}", "--frame_gap_s=0.2"])
    table = CodeTable.load(table_path)
    assert table.frame_gap == 2
    assert int(table.valid.sum()) == sum(length - 2 for length in (12, 9, 14, 10))
    images = [LeRobotDataset("test/tiny", root=tiny_dataset)[i][CAMERA] for i in (13, 15)]
    pair = (torch.stack(images) * 255).round().to(torch.uint8).movedim(1, -1)[None]
    expected = LatentActionQuantizer.from_pretrained(tiny_laq).encode(pair)
    assert torch.equal(table.codes[13].long(), expected[0].long())


def test_a_laq_of_a_gap_in_seconds(tiny_dataset: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HLRP_DEBUG", "1")  # errors as they are raised
    flags = ["--dataset.repo_id=test/tiny", f"--dataset.root={tiny_dataset}", f"--output_dir={tmp_path / 'laq'}"]
    flags += ["--laq.image_size=16", "--laq.hidden_dim=16", "--laq.num_layers=1", "--steps=1", "--eval_share=0.5"]

    def run(*more: str) -> None:
        run_command(laq_train.TrainLAQCommand, laq_train.train, [*flags, "--frame_gap_s=0.2", *more])

    with pytest.raises(ValueError, match=r"frame_gap_s, laq.frame_gap: expected one of them, got 0.2 s and 5 frames"):
        run("--laq.frame_gap=5")
    run()
    assert LatentActionQuantizer.from_pretrained(tmp_path / "laq").frame_gap == 2


@pytest.fixture(scope="module")
def fast_dataset(make_dataset, tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "fast", fps=20)


def learned(**settings) -> HLRPQwenConfig:
    """Settings of a checkpoint that learned from pairs 3 frames apart at 10 per second."""
    return HLRPQwenConfig(camera=CAMERA, frame_gap=3, frame_gap_s=0.3, **settings)


def test_a_checkpoint_compares_seconds(fast_dataset, code_table):
    meta = LeRobotDatasetMetadata("test/tiny", root=fast_dataset)
    config = learned(codes=str(code_table(fast_dataset, frame_gap=6)))
    open_label_source(config, meta)
    assert (config.frame_gap, config.frame_gap_s) == (6, pytest.approx(0.3))
    same_frames = str(code_table(fast_dataset, frame_gap=3))
    with pytest.raises(ValueError, match=r"frames 0.3 s apart.*3 frames at 20.*0.15 s.*--frame_gap_s=0.3.*gap=null"):
        open_label_source(learned(codes=same_frames), meta)
    forgotten = HLRPQwenConfig(camera=CAMERA, frame_gap_s=0.3, codes=same_frames)  # --policy.frame_gap=null
    with pytest.raises(ValueError, match=r"frame_gap_s: expected None on a new run.*--policy.frame_gap, in frames of"):
        open_label_source(forgotten, meta)
    forgotten.pretrained_path = fast_dataset  # it was a checkpoint's
    open_label_source(forgotten, meta)
    assert (forgotten.frame_gap, forgotten.frame_gap_s) == (3, pytest.approx(0.15))


def test_an_online_laq_takes_the_policys_gap(fast_dataset, tiny_laq):
    meta = LeRobotDatasetMetadata("test/tiny", root=fast_dataset)
    with pytest.raises(ValueError, match=r"frames 0.3 s apart.*--policy.frame_gap=6"):
        open_label_source(learned(laq=str(tiny_laq)), meta)
    config = learned(laq=str(tiny_laq))
    config.frame_gap = 6
    assert config.observation_delta_indices == [0, 6]
    source = open_label_source(config, meta)
    assert (source.span, config.label_span, config.frame_gap_s) == (6, 6, pytest.approx(0.3))
    assert HLRPQwenConfig(laq=str(tiny_laq)).observation_delta_indices == [0, 3]


def test_code_vectors_say_nothing_of_the_gap(fast_dataset, tiny_laq):
    config = HLRPQwenConfig(camera=CAMERA, frame_gap_s=0.3, laq=str(tiny_laq), mode="multitask", action_head="laq")
    config.pretrained_path = fast_dataset  # whose gap was given up with --policy.frame_gap=null
    assert read_code_vectors(config, has_new_code_head=False) is not None
    assert config.frame_gap is None
    open_label_source(config, LeRobotDatasetMetadata("test/tiny", root=fast_dataset))
    assert (config.frame_gap, config.frame_gap_s) == (3, pytest.approx(0.15))
