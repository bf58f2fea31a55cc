"""What the training of a LAQ reads: cached frames, and the motion that probes are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from hlrp_core.laq.config import LAQConfig
from lerobot_hlrp.frame_reader import EpisodeFrames, choose_camera, read_actions
from lerobot_hlrp.laq_data import TuplePlan, cache_frames, sum_over_gap

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


def test_motion_is_the_sum_of_the_actions_over_the_gap(tiny_dataset, tmp_path):
    dataset = open_dataset(tiny_dataset)
    frames = cache_frames(dataset, "observation.images.top", 16, tmp_path / "a.npy", fingerprint="f")
    training, _ = TuplePlan(dataset, TINY, eval_share=0.25).build(frames)
    actions = read_actions(dataset)
    sums = np.stack([actions[start] + actions[start + 1] for start in training.starts])
    expected = (sums - sums.mean(0)) / sums.std(0)
    np.testing.assert_allclose(training.motion, expected, atol=1e-4)


def test_unknown_actions_spoil_no_other_sum():
    actions = np.arange(12, dtype=np.float32).reshape(6, 2)
    broken = actions.copy()
    broken[2, 1] = np.nan
    expected = sum_over_gap(actions, 2)
    assert expected[0].tolist() == [2, 4]
    expected[[1, 2]] = np.nan
    np.testing.assert_array_equal(sum_over_gap(broken, 2), expected)
