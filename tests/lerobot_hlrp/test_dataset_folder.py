"""Datasets that `--dataset.*` names and that are not there."""

from __future__ import annotations

import pytest
from lerobot.configs.default import DatasetConfig
from lerobot.transforms import ImageTransformsConfig

from lerobot_hlrp.dataset_folder import load_metadata, load_whole_dataset

OPENERS = (load_metadata, lambda dataset: load_whole_dataset(dataset, purpose="a test"))


@pytest.mark.parametrize("open_dataset", OPENERS)
def test_a_misspelt_root_is_refused_and_not_made(open_dataset, tmp_path):
    with pytest.raises(
        ValueError, match=r"dataset\.root: expected .*meta/info\.json, got .*nowhere, which is no folder"
    ):
        open_dataset(DatasetConfig("test/tiny", root=str(tmp_path / "nowhere")))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file, which is no folder\. Next step: Check --dataset\.root"):
        open_dataset(DatasetConfig("test/tiny", root=str(tmp_path / "file")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty, which has none\. Next step"):
        open_dataset(DatasetConfig("test/tiny", root=str(tmp_path / "empty")))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


@pytest.mark.parametrize("open_dataset", OPENERS)
def test_a_dataset_that_is_nowhere(open_dataset):
    with pytest.raises(ValueError, match=r"dataset: expected a LeRobotDataset in .*test/nothing.*HF_HUB_OFFLINE.*Next"):
        open_dataset(DatasetConfig("test/nothing"))


def test_a_dataset_with_parts_missing(make_dataset, tmp_path):
    root = make_dataset(tmp_path / "set")
    (root / "meta" / "tasks.parquet").unlink()
    with pytest.raises(ValueError, match=r"dataset: expected all files of a LeRobotDataset in .*Next step"):
        load_metadata(DatasetConfig("test/tiny", root=str(root)))


@pytest.mark.parametrize(("episodes", "got"), [([7], "7"), ([0, 4, 9], "4, 9"), ([], "none")])
def test_episodes_that_are_not_there(episodes, got, tiny_dataset):
    dataset = DatasetConfig("test/tiny", root=str(tiny_dataset), episodes=episodes)
    with pytest.raises(ValueError, match=rf"dataset\.episodes: expected some of 0 to 3, .*got {got}\. Next step"):
        load_metadata(dataset)


def test_episodes_that_are_there(tiny_dataset):
    assert load_metadata(DatasetConfig("test/tiny", root=str(tiny_dataset), episodes=[0, 3])).total_episodes == 4


def test_streaming_is_refused(tiny_dataset):
    with pytest.raises(ValueError, match=r"dataset\.streaming: expected a dataset on disk.*streaming=true\. Next step"):
        load_metadata(DatasetConfig("test/tiny", root=str(tiny_dataset), streaming=True))


def test_a_whole_dataset_takes_the_video_backend_and_no_transforms(tiny_videos):
    def load(**settings):
        return load_whole_dataset(DatasetConfig("test/tiny", root=str(tiny_videos), **settings), purpose="a test")

    for name in ("torchcodec", "pyav"):
        assert load(video_backend=name)._video_backend == name
    with pytest.raises(ValueError, match=r"dataset\.video_backend: expected one of torchcodec, pyav.*'pyaw'.*'pyav'\?"):
        load(video_backend="pyaw")
    with pytest.raises(ValueError, match=r"dataset\.image_transforms: expected none, as a test .*Next step"):
        load(image_transforms=ImageTransformsConfig(enable=True))
