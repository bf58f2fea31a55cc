"""`hlrp-record`: a recording that is stopped, killed, or continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from recording_helpers import assert_same_dataset, load, make_plan

from hlrp_tabletop import TabletopEnv
from lerobot_hlrp.recording import session
from lerobot_hlrp.recording.manifest import MANIFEST_PATH, Manifest
from lerobot_hlrp.recording.segment_writer import SegmentWriter
from lerobot_hlrp.recording.session import record


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments in a few episodes."""
    monkeypatch.setattr(session, "SegmentWriter", partial(SegmentWriter, segment_frames=20))


class Killed(BaseException):
    """Stands in for a kill: nothing in the program may catch it."""


def kill_in_the_middle_of_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the second segment are written but the manifest is not."""
    original, calls = Manifest.save, []

    def save(manifest: Manifest, root: Path) -> None:
        calls.append(manifest.num_segments)
        if manifest.num_segments == 2:
            raise Killed
        original(manifest, root)

    monkeypatch.setattr(Manifest, "save", save)


def kill_while_writing_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment's data file stays half written."""
    original = SegmentWriter._write_segment

    def write(writer: SegmentWriter, segment: int) -> None:
        if segment == 1:
            (writer.root / "data/chunk-000/file-001.parquet.partial").write_bytes(b"PAR1 half")
            raise Killed
        original(writer, segment)

    monkeypatch.setattr(SegmentWriter, "_write_segment", write)


def kill_between_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment is there, the statistics and counts are those of the first."""

    def write(writer: SegmentWriter) -> None:
        if writer.manifest.num_segments == 2:
            raise Killed
        original(writer)

    original = SegmentWriter._write_metadata
    monkeypatch.setattr(SegmentWriter, "_write_metadata", write)


@pytest.mark.parametrize(
    ("kill", "use_video"),
    [
        (kill_in_the_middle_of_a_commit, False),
        (kill_in_the_middle_of_a_commit, True),
        (kill_while_writing_a_file, False),
        (kill_between_files, False),
    ],
)
def test_a_killed_recording_goes_on_as_if_nothing_had_happened(tmp_path: Path, kill: Callable, use_video: bool):
    whole, source = make_plan(tmp_path / "whole", episodes=10, use_video=use_video)
    record(whole, source)
    plan, source = make_plan(tmp_path / "killed", episodes=10, use_video=use_video)
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            record(plan, source)
    SegmentWriter(plan.root, plan.layout, Manifest.load(plan.root))  # the next run, dying before its first episode
    first_segment = Manifest.load(plan.root)
    assert first_segment.num_segments == 1
    files = {path.name for folder in ("data", "meta/episodes") for path in (plan.root / folder).rglob("*.parquet*")}
    assert files == {"file-000.parquet"}
    assert (len(load(plan.root)), load(plan.root).num_episodes) == (
        first_segment.num_frames,
        first_segment.num_episodes,
    )
    manifest, is_complete = record(plan, source)
    assert is_complete
    assert_same_dataset(whole.root, plan.root)
    assert manifest == Manifest.load(whole.root)
    leftovers = [path for path in plan.root.rglob("*") if path.suffix == ".partial" or path.name == ".recording"]
    assert leftovers == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_whole_episodes(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch):
    whole, source = make_plan(tmp_path / "whole", task="reach,push", episodes=10)
    record(whole, source)
    plan, source = make_plan(tmp_path / "stopped", task="reach,push", episodes=10)
    original, steps = TabletopEnv.step, []

    def step(env: TabletopEnv, action: np.ndarray):
        steps.append(env)
        if len(steps) == 70:
            os.kill(os.getpid(), number)
        return original(env, action)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TabletopEnv, "step", step)
        manifest, is_complete = record(plan, source)
    assert not is_complete
    assert signal.getsignal(number) is before
    assert 0 < manifest.num_episodes < 10
    partial_dataset = load(plan.root)  # it can be used as it is
    assert partial_dataset.num_episodes == manifest.num_episodes
    assert manifest.num_frames <= 70 < manifest.num_frames + 60
    _, is_complete = record(plan, source)
    assert is_complete
    assert_same_dataset(whole.root, plan.root)


def test_a_second_signal_ends_it_at_once(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=10)
    original, steps = TabletopEnv.step, []

    def step(env: TabletopEnv, action: np.ndarray):
        steps.append(env)
        if len(steps) == 70:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(env, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TabletopEnv, "step", step)
        with pytest.raises(KeyboardInterrupt):
            record(plan, source)
    assert len(steps) == 70
    _, is_complete = record(plan, source)
    assert is_complete
    assert load(plan.root).num_episodes == 10


def test_more_episodes_are_added_to_a_finished_recording(tmp_path: Path):
    whole, source = make_plan(tmp_path / "whole", episodes=9)
    record(whole, source)
    for episodes in (5, 9):
        plan, source = make_plan(tmp_path / "grown", episodes=episodes)
        record(plan, source)
    assert_same_dataset(whole.root, tmp_path / "grown")


def test_a_finished_recording_is_left_alone(tmp_path: Path):
    plan, source = make_plan(tmp_path / "set", episodes=3)
    record(plan, source)
    times = {path: path.stat().st_mtime_ns for path in plan.root.rglob("*")}
    _, is_complete = record(plan, source)
    assert is_complete
    assert times == {path: path.stat().st_mtime_ns for path in plan.root.rglob("*")}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "\xff", '{"schema_version": 1}', '{"schema_version": 1, "new": 2}']
)
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path):
    plan, source = make_plan(tmp_path / "data", episodes=1)
    path = plan.root / MANIFEST_PATH
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"hlrp_recording\.json: expected the manifest.*damaged file.*Next step"):
        record(plan, source)
