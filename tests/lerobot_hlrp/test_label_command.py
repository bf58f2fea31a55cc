"""hlrp-label: what it refuses, before any work, and datasets of other shapes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import LeRobotDataset, video_utils

from hlrp_core.laq.code_table import CodeTable
from lerobot_hlrp import labelling
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.cli.label import LabelCommand, label
from lerobot_hlrp.frame_reader import choose_camera, read_actions
from lerobot_hlrp.label_sources import name_laq
from lerobot_hlrp.labelling import PartialTable


def make_command(root: Path, laq: Path | str, output: Path, *, device: str = "cpu", **settings) -> LabelCommand:
    own = {name: settings.pop(name) for name in ("camera", "batch_size") if name in settings}
    dataset = DatasetConfig(repo_id="test/tiny", root=str(root), **settings)
    return LabelCommand(laq=str(laq), dataset=dataset, output=output, device=device, **own)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelling is not even begun."""

    def fail(*_, **__):
        raise AssertionError("frames were read")

    monkeypatch.setattr(labelling, "label_dataset", fail)


@pytest.mark.parametrize(
    ("name", "value"), [("episodes", [0, 1]), ("episodes", []), ("eval_split", 0.5), ("streaming", True)]
)
def test_a_part_of_a_dataset_is_refused(name, value, no_work, tiny_dataset, tiny_laq, tmp_path):
    command = make_command(tiny_dataset, tiny_laq, tmp_path / "codes", **{name: value})
    with pytest.raises(
        ValueError, match=rf"dataset\.{name}: expected none, as a code table is of the whole.*Next step"
    ):
        label(command)


def test_the_revision_is_passed_on(tiny_dataset, tiny_laq, tmp_path, monkeypatch):
    seen, opened = [], LeRobotDataset.__init__

    def note(self, repo_id, **settings):
        seen.append(settings.pop("revision", None))
        opened(self, repo_id, **settings)

    monkeypatch.setattr(LeRobotDataset, "__init__", note)
    assert label(make_command(tiny_dataset, tiny_laq, tmp_path / "codes", revision="v1")) == 0
    assert seen == ["v1"]


@pytest.mark.parametrize("output", ["folder", "file/codes"])
def test_an_output_that_cannot_be_written_is_refused_first(output, no_work, tiny_dataset, tiny_laq, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output: expected .*Next step"):
        label(make_command(tiny_dataset, tiny_laq, tmp_path / output))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_an_old_table_is_replaced(tiny_dataset, tiny_laq, tmp_path):
    (tmp_path / "codes").write_text("old")
    assert label(make_command(tiny_dataset, tiny_laq, tmp_path / "codes")) == 0
    assert CodeTable.load(tmp_path / "codes").valid.any()


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_kill_while_saving_leaves_the_codes_of_one_run(is_renamed, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def run(identity: str, code: int, num_frames: int) -> PartialTable:
        partial = PartialTable(tmp_path / "codes", identity, (6, 2))
        if partial.num_frames == 0:
            partial.add(torch.full((num_frames, 2), code, dtype=torch.int32), first_row=0)
        return partial

    def killing(path: Path, target: Path) -> None:
        if is_renamed:
            rename(path, target)
        raise Killed

    run("one", 1, 2).save()
    rename = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killing)
        with pytest.raises(Killed):
            run("other", 2, 4).save()
    for identity, code, num_frames in (("one", 1, 2), ("other", 2, 4)):
        found = PartialTable(tmp_path / "codes", identity, (6, 2))
        assert found.num_frames == (num_frames if is_renamed == (identity == "other") else 0)
        assert found.codes[: found.num_frames].eq(code).all()
        assert int(found.valid.sum()) == found.num_frames
    found.delete()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"half a file"])
def test_a_damaged_partial_table_is_begun_anew(content, tiny_dataset, tiny_laq, tmp_path, caplog):
    (tmp_path / ".codes.partial").write_bytes(content)
    assert label(make_command(tiny_dataset, tiny_laq, tmp_path / "codes")) == 0
    assert "Labelling begins anew" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_a_table_names_a_laq_by_its_folder(tiny_dataset, tiny_laq, tmp_path):
    assert label(make_command(tiny_dataset, tiny_laq, tmp_path / "codes")) == 0
    assert CodeTable.load(tmp_path / "codes").header.laq_id == "tiny-laq"
    assert name_laq("user/laq") == "user/laq"


def test_bad_numbers_and_devices_are_refused_at_once(no_work, tiny_dataset, tiny_laq, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size: expected 1 or more, got 0\. Next step"):
        make_command(tiny_dataset, tiny_laq, tmp_path / "codes", batch_size=0)
    with pytest.raises(ValueError, match=r"device: expected one of this machine's: cpu.*got 'cudaa'\. Next step"):
        label(make_command(tiny_dataset, tiny_laq, tmp_path / "codes", device="cudaa"))


def test_bad_flags_are_one_line(no_work, tiny_dataset, tiny_laq, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HLRP_DEBUG", raising=False)
    flags = [f"--laq={tiny_laq}", "--dataset.repo_id=test/tiny", f"--dataset.root={tiny_dataset}"]
    for flag, words in (("--batch_size=0", "batch_size: expected 1"), ("--device=cudaa", "device: expected one of")):
        with pytest.raises(SystemExit) as exit_:
            run_command(LabelCommand, label, [*flags, f"--output={tmp_path / 'codes'}", flag])
        assert exit_.value.code == 1
        assert capsys.readouterr().err.splitlines()[0].startswith(f"error: {words}")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "outputs/of/laq", "outputs/laq", "laq"])
def test_a_laq_that_is_not_there(name, no_work, tiny_dataset, tmp_path):
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"laq: expected .*got {name}, which is no folder.*Next step"):
        label(make_command(tiny_dataset, name, tmp_path / "codes"))
    assert time.monotonic() - began < 10


def test_vectors_of_one_number(make_dataset, tiny_laq, tmp_path):
    """LeRobot stores them as numbers."""
    root = make_dataset(tmp_path / "data", action_dim=1, state_dim=1)
    dataset = LeRobotDataset("test/tiny", root=root)
    actions = read_actions(dataset)
    assert actions.shape == (len(dataset), 1)
    np.testing.assert_array_equal(actions, np.stack([item["action"].reshape(1) for item in dataset]))
    assert label(make_command(root, tiny_laq, tmp_path / "codes")) == 0


def test_cameras_are_called_as_in_a_policy(make_dataset, tabletop_dataset, tiny_laq, tmp_path):
    meta = LeRobotDataset("test/tiny", root=tabletop_dataset).meta
    for name in (None, "image", "observation.image"):
        assert choose_camera(meta, name) == "observation.image"
    with pytest.raises(ValueError, match=r"camera: expected one of observation\.image, got imgae.*--camera=image\?$"):
        choose_camera(meta, "imgae")
    assert label(make_command(tabletop_dataset, tiny_laq, tmp_path / "codes", camera="image")) == 0
    assert CodeTable.load(tmp_path / "codes").header.camera == "observation.image"
    cameras = ("observation.images.left.wrist", "observation.images.top")
    meta = LeRobotDataset("test/tiny", root=make_dataset(tmp_path / "two", cameras=cameras)).meta
    assert choose_camera(meta, "left.wrist") == choose_camera(meta, "wrist") == cameras[0]
    with pytest.raises(ValueError, match=r"camera: .*left\.wrist, observation\.images\.top.*Set --camera, for example"):
        choose_camera(meta, None)


@pytest.mark.parametrize("name", ["torchcodec", "video_reader"])
def test_the_video_backend_decodes(name, tiny_videos, tiny_laq, tmp_path, monkeypatch):
    seen, decode = set(), video_utils.decode_video_frames

    def note(*args, backend, **settings):
        seen.add(backend)
        return decode(*args, backend="pyav", **settings)

    monkeypatch.setattr(video_utils, "decode_video_frames", note)
    assert label(make_command(tiny_videos, tiny_laq, tmp_path / "codes", video_backend=name)) == 0
    assert seen == {name}
