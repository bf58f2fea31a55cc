"""What the training of a LAQ reads: cached frames, and the motion that probes are judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from hlrp_core.laq.config import LAQConfig
from lerobot_hlrp.frame_reader import EpisodeFrames, choose_camera, read_actions
from lerobot_hlrp.laq_data import TuplePlan, cache_frames, difference_over_gap, sum_over_gap

TINY = LAQConfig(image_size=16, hidden_dim=16, num_layers=1, frame_gap=2, code_seq_len=2)


def open_dataset(root: Path) -> LeRobotDataset:
    return LeRobotDataset("test/tiny", root=root)


def test_a_killed_cache_is_continued(tiny_dataset, tmp_path, monkeypatch):
    dataset = open_dataset(tiny_dataset)
    camera, path = choose_camera(dataset.meta, None), tmp_path / "a.npy"
    whole = np.array(cache_frames(dataset, camera, 16, path, fingerprint="f"))
    path.unlink()
    read, read_piece = [], EpisodeFrames.read

    def kill_in_third(self, piece):
        if piece.episode == 2:
            raise KeyboardInterrupt
        return read_piece(self, piece)

    def note(self, piece):
        read.append(piece.episode)
        return read_piece(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeFrames, "read", kill_in_third)
        with pytest.raises(KeyboardInterrupt):
            cache_frames(dataset, camera, 16, path, fingerprint="f", save_interval_s=0)
    monkeypatch.setattr(EpisodeFrames, "read", note)
    np.testing.assert_array_equal(cache_frames(dataset, camera, 16, path, fingerprint="f"), whole)
    assert read == [2, 3]
    np.testing.assert_array_equal(cache_frames(dataset, camera, 16, path, fingerprint="f"), whole)
    assert read == [2, 3]
    other = cache_frames(dataset, camera, 8, path, fingerprint="f")
    assert other.shape == (45, 8, 8, 3)


def test_video_without_actions_trains_without_probe(tiny_videos, tmp_path):
    dataset = open_dataset(tiny_videos)
    frames = cache_frames(dataset, "observation.images.top", 16, tmp_path / "a.npy", fingerprint="f")
    training, held_out = TuplePlan(dataset, TINY, eval_share=0.25).build(frames)
    assert training.motion is None
    assert held_out.motion is None
    assert read_actions(dataset) is None


def slow_motion(dataset: LeRobotDataset, start: int, span: int, probe: str) -> np.ndarray:
    """From LeRobot's own samples, one by one."""
    samples = [dataset[index] for index in range(start, start + span + 1)]
    assert len({int(sample["episode_index"]) for sample in samples}) == 1
    actions = [sample["action"].numpy() for sample in samples]
    return sum(actions[:-1]) if probe == "sum" else actions[-1] - actions[0]


@pytest.mark.parametrize("num_frames", [2, 3])
@pytest.mark.parametrize("probe", ["sum", "difference"])
def test_motion_is_what_the_actions_do_over_the_gap(probe, num_frames, tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    config = replace(TINY, num_frames=num_frames)
    plan = TuplePlan(dataset, config, eval_share=0.25, probe=probe)
    training, held_out = plan.build(np.zeros((len(dataset), 1, 1, 3), dtype=np.uint8))
    span = 2 * (num_frames - 1)
    assert len(training) == 12 + 9 + 14 - 3 * span
    assert len(held_out) == 10 - span
    slow = np.stack([slow_motion(dataset, start, span, probe) for start in training.starts])
    mean, std = slow.mean(0), slow.std(0)
    np.testing.assert_allclose(training.motion, (slow - mean) / std, atol=1e-4)
    slow = np.stack([slow_motion(dataset, start, span, probe) for start in held_out.starts])
    np.testing.assert_allclose(held_out.motion, (slow - mean) / std, atol=1e-4)


def test_the_sum_is_what_is_measured_by_default(tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    default, asked = (TuplePlan(dataset, TINY, eval_share=0.25, **probe) for probe in ({}, {"probe": "sum"}))
    np.testing.assert_array_equal(default.motions[0], asked.motions[0])


def test_unknown_actions_spoil_no_other_sum():
    actions = np.arange(12, dtype=np.float32).reshape(6, 2)
    broken = actions.copy()
    broken[2, 1] = np.nan
    expected = sum_over_gap(actions, 2)
    assert expected[0].tolist() == [2, 4]
    expected[[1, 2]] = np.nan
    np.testing.assert_array_equal(sum_over_gap(broken, 2), expected)


@pytest.mark.parametrize("span", [1, 2, 6, 9])
def test_differences_are_unknown_past_the_end_and_where_an_action_is(span):
    actions = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    actions[2, 1], actions[4, 0] = np.nan, np.inf
    slow = np.full((6, 2), np.nan, dtype=np.float32)
    for start in range(6):
        if start + span < 6 and not {2, 4} & {start, start + span}:
            slow[start] = actions[start + span] - actions[start]
    np.testing.assert_array_equal(difference_over_gap(actions, span), slow)
