"""Decoding frames in order equals LeRobot's own decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames

from lerobot_hlrp.video_decoding import decode_in_order

TOLERANCE_S = 1e-4


@pytest.fixture
def video(tiny_videos) -> tuple[Path, int, int]:
    """File, frames and fps of the first one of the data set."""
    meta = LeRobotDataset("test/tiny", root=tiny_videos).meta
    path = Path(tiny_videos) / meta.get_video_file_path(0, meta.video_keys[0])
    return path, meta.total_frames, meta.fps


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (1, 2), (3, 8), (-1, None)])
def test_it_equals_lerobots_decoder(start, stop, video):
    path, num_frames, fps = video
    timestamps = [i / fps for i in range(num_frames)][start:stop]
    expected = decode_video_frames(path, timestamps, TOLERANCE_S, backend="pyav", return_uint8=True)
    frames = decode_in_order(path, timestamps, fps=fps, tolerance_s=TOLERANCE_S)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("offset", [-0.3, 0.3])
def test_the_nearest_frame_is_taken_where_the_tolerance_is_wide(offset, video):
    path, _, fps = video
    timestamps = [(i + offset) / fps for i in range(2, 7)]
    expected = decode_in_order(path, [i / fps for i in range(2, 7)], fps=fps, tolerance_s=TOLERANCE_S)
    np.testing.assert_array_equal(decode_in_order(path, timestamps, fps=fps, tolerance_s=0.9 / fps), expected)


@pytest.mark.parametrize("shift", [0.3, 1000])
def test_a_time_without_a_frame_is_named(shift, video):
    path, _, fps = video
    with pytest.raises(ValueError, match=r"expected a frame within 0.0001 s of .*\. Next step: "):
        decode_in_order(path, [(i + shift) / fps for i in range(3)], fps=fps, tolerance_s=TOLERANCE_S)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_file_is_named(keep, video, tmp_path):
    path, _, fps = video
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"damaged\.mp4: expected a video that FFmpeg can decode, got .*Next step"):
        decode_in_order(damaged, [0.0], fps=fps, tolerance_s=TOLERANCE_S)
