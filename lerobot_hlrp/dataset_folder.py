"""Opening the LeRobotDataset that `--dataset.*` flags name, with errors that say what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hlrp_core.expectation import expect, expect_choice
from lerobot_hlrp.hub_folder import HUB_ERRORS, describe_hub_error

if TYPE_CHECKING:
    from lerobot.configs.default import DatasetConfig
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata

# Those that LeRobot decodes with; an unknown one it would name with the first frame only.
VIDEO_BACKENDS = ("torchcodec", "pyav", "video_reader")


def load_metadata(dataset: DatasetConfig) -> LeRobotDatasetMetadata:
    """Metadata of the dataset, which has the episodes that the flags name.

    Raises:
        ValueError: no dataset there, or not these episodes in it, or the flags ask to stream it.
    """
    from lerobot.datasets import LeRobotDatasetMetadata

    expect(
        not dataset.streaming,
        "dataset.streaming",
        "a dataset on disk, of which samples are drawn in any order",
        "streaming=true",
        "Leave --dataset.streaming out.",
    )
    with _readable_errors(dataset):
        meta = LeRobotDatasetMetadata(dataset.repo_id, root=dataset.root, revision=dataset.revision)
    if dataset.episodes is not None:
        strange = [episode for episode in dataset.episodes if not 0 <= episode < meta.total_episodes]
        expect(
            bool(dataset.episodes) and not strange,
            "dataset.episodes",
            f"some of 0 to {meta.total_episodes - 1}, the episodes of {dataset.repo_id}",
            ", ".join(map(str, strange)) or "none",
            "Correct --dataset.episodes, or leave it out for all of them.",
        )
    return meta


def load_whole_dataset(dataset: DatasetConfig, *, purpose: str) -> LeRobotDataset:
    """All episodes of the dataset.

    Args:
        purpose: what is made from them, for the message.

    Raises:
        ValueError: no dataset there, or the flags name a part of it, ask to stream it or to change its frames.
    """
    from lerobot.datasets import LeRobotDataset

    for name in ("episodes", "eval_split", "streaming"):
        value = getattr(dataset, name)
        expect(
            value in (None, False, 0),
            f"dataset.{name}",
            f"none, as {purpose} is of the whole dataset",
            value,
            f"Leave --dataset.{name} out.",
        )
    expect(
        not dataset.image_transforms.enable,
        "dataset.image_transforms",
        f"none, as {purpose} is made from the frames as they are",
        "enable=true",
        "Leave --dataset.image_transforms.enable out.",
    )
    expect_choice("dataset.video_backend", dataset.video_backend, VIDEO_BACKENDS)
    with _readable_errors(dataset):
        return LeRobotDataset(
            dataset.repo_id, root=dataset.root, revision=dataset.revision, video_backend=dataset.video_backend
        )


@contextmanager
def _readable_errors(dataset: DatasetConfig) -> Iterator[None]:
    if dataset.root is not None:
        # LeRobot would make the folder and go on to the Hub.
        expect(
            (Path(dataset.root) / "meta" / "info.json").is_file(),
            "dataset.root",
            "the folder of a LeRobotDataset, with a file meta/info.json",
            f"{dataset.root}, which {'has none' if Path(dataset.root).is_dir() else 'is no folder'}",
            "Check --dataset.root; without it, --dataset.repo_id is looked for in LeRobot's own place and on the Hub.",
        )
    try:
        yield
    except HUB_ERRORS as error:
        if dataset.root is not None:
            place = f"all files of a LeRobotDataset in {dataset.root}"
        else:
            from lerobot.utils.constants import HF_LEROBOT_HOME

            place = f"a LeRobotDataset in {HF_LEROBOT_HOME / dataset.repo_id}, or on the Hub"
        raise ValueError(
            f"dataset: expected {place}, got none; of {dataset.repo_id} on the Hub: {describe_hub_error(error)}. "
            "Next step: Check --dataset.repo_id, or name the dataset's folder with --dataset.root."
        ) from error
