"""Reading a dataset's frames: the fast way equals LeRobot's own items."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset

from lerobot_hlrp.frame_reader import EpisodeFrames, Piece, choose_camera, read_frame


def open_dataset(root: Path) -> LeRobotDataset:
    return LeRobotDataset("test/tiny", root=root)


@pytest.mark.parametrize("num_frames", [4, 256])
@pytest.mark.parametrize("fixture", ["tiny_dataset", "tiny_videos"])
def test_fast_reading_equals_lerobots_items(fixture, num_frames, request):
    dataset = open_dataset(request.getfixturevalue(fixture))
    camera = choose_camera(dataset.meta, None)
    episodes = EpisodeFrames(dataset, camera)
    frames = [frame for piece in episodes.pieces(num_frames=num_frames) for frame in episodes.read(piece)]
    assert len(frames) == len(dataset)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame, read_frame(dataset, camera, index))


def test_pieces_have_every_tuple_once(tiny_dataset):
    episodes = EpisodeFrames(open_dataset(tiny_dataset), "observation.images.top")
    assert episodes.lengths == [12, 9, 14, 10]
    assert [piece for piece in episodes.pieces(overlap=2, num_frames=5) if piece.episode in (0, 2)] == [
        *((0, 0, 7), (0, 5, 12)),
        *((2, 0, 7), (2, 5, 12), (2, 10, 14)),
    ]
    assert {piece.episode for piece in episodes.pieces(overlap=10)} == {0, 2}
    assert [piece.start for piece in episodes.pieces(overlap=10, num_frames=1)] == [0, 1, 0, 1, 2, 3]


def test_an_unknown_camera_offers_the_closest(tiny_dataset):
    meta = open_dataset(tiny_dataset).meta
    assert choose_camera(meta, "top") == "observation.images.top"
    with pytest.raises(ValueError, match=r"expected one of observation.images.top, got tpo.*--camera=top"):
        choose_camera(meta, "tpo")


def test_reading_ahead_gives_the_same_frames_and_stays_within_bounds(tiny_dataset, monkeypatch):
    episodes = EpisodeFrames(open_dataset(tiny_dataset), "observation.images.top")
    pieces = [Piece(3, 0, 10), Piece(0, 0, 5), Piece(0, 5, 10), Piece(2, 0, 14)]
    expected = [episodes.read(piece) for piece in pieces]
    started, read_piece = [], EpisodeFrames.read

    def note(self, piece):
        started.append(piece)
        return read_piece(self, piece)

    monkeypatch.setattr(EpisodeFrames, "read", note)
    for num_frames in (1, 20, 1000):
        started.clear()
        for number, frames in enumerate(episodes.read_ahead(pieces, num_frames=num_frames)):
            np.testing.assert_array_equal(frames, expected[number])
            if num_frames == 1:
                assert len(started) <= number + 2
        assert started == pieces


def test_decoding_goes_on_while_the_caller_works(tiny_dataset, monkeypatch):
    episodes = EpisodeFrames(open_dataset(tiny_dataset), "observation.images.top")
    begun = threading.Event()

    def read(self, piece):
        if piece.episode == 1:
            begun.set()
        return np.zeros((piece.stop - piece.start, 1))

    monkeypatch.setattr(EpisodeFrames, "read", read)
    ahead = episodes.read_ahead([Piece(0, 0, 10), Piece(1, 0, 11)], num_frames=1)
    next(ahead)
    assert begun.wait(timeout=10), "the next piece was not decoded while the caller held the first one"
