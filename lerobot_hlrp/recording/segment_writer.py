"""A LeRobotDataset v3 on disk, written in segments that are complete or not there.

LeRobot's own writer costs 55-75 ms per episode whatever its length (a Hugging Face dataset is built and fingerprinted
for each) and leaves an unreadable file behind when it is killed. Short episodes by the thousand want neither. Here
episodes are collected and written as a segment: one data file, one episodes file and, for videos, one video file. The
last step of a commit is the manifest; opening the folder again drops whatever lies beyond it.

The content is what LeRobot's writer makes of the same frames, column by column (a test compares them).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.configs.video import rgb_encoder_defaults
from lerobot.datasets.compute_stats import aggregate_stats
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION
from lerobot.datasets.feature_utils import create_empty_dataset_info, get_hf_features_from_features
from lerobot.datasets.io_utils import write_table_one_row_group_per_episode
from lerobot.datasets.utils import (
    DEFAULT_CHUNK_SIZE,
    DEFAULT_DATA_PATH,
    DEFAULT_EPISODES_PATH,
    DEFAULT_TASKS_PATH,
    DEFAULT_VIDEO_PATH,
    INFO_PATH,
    STATS_PATH,
    serialize_dict,
)
from lerobot.datasets.video_utils import get_video_info
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from lerobot.utils.utils import flatten_dict

from lerobot_hlrp.recording.episode import Episode
from lerobot_hlrp.recording.files import write_json_whole, write_whole
from lerobot_hlrp.recording.image_store import PngColumn, PngFolder
from lerobot_hlrp.recording.layout import DatasetLayout
from lerobot_hlrp.recording.manifest import Manifest
from lerobot_hlrp.recording.statistics import episode_statistics, read_statistics

SCRATCH = ".recording"


class SegmentWriter:
    """Appends episodes to the dataset in `root` and keeps its manifest.

    The folder is new, or one with this manifest's committed segments; anything beyond them is deleted.
    Call `commit` at the end: episodes added since the last commit are in memory only.
    """

    def __init__(
        self,
        root: Path,
        layout: DatasetLayout,
        manifest: Manifest,
        *,
        segment_frames: int = 2000,
        segment_bytes: int = 64 * 2**20,
    ):
        self.root = root
        self.layout = layout
        self.manifest = manifest
        self._segment_frames = segment_frames
        self._segment_bytes = segment_bytes
        self._features = layout.features()
        self._schema = get_hf_features_from_features(self._features).arrow_schema
        self._tasks: dict[str, int] = {}
        self._statistics: dict[str, dict[str, np.ndarray]] | None = None
        self._video_info: dict[str, Any] | None = None
        self._roll_back()
        self._images = PngFolder(root / SCRATCH) if layout.use_video else PngColumn()
        self._columns: dict[str, list[np.ndarray]] = {key: [] for key in self._schema.names if key != OBS_IMAGE}
        self._episode_rows: list[dict[str, Any]] = []
        self._segment_statistics: list[dict[str, dict[str, np.ndarray]]] = []
        self._first_frame = manifest.num_frames  # of the open segment

    def add_episode(self, episode: Episode, seed: int) -> None:
        """Adds an episode that the environment played from `seed`; commits when the segment is full."""
        for frame_index, image in enumerate(episode.images):
            self._images.add(image, frame_index)
        columns = self._episode_columns(episode)
        for key, values in columns.items():
            self._columns[key].append(values)
        statistics = episode_statistics(columns, episode.images, self._features)
        self._segment_statistics.append(statistics)
        self._episode_rows.append(self._episode_row(episode, statistics))
        self.manifest.num_episodes += 1
        self.manifest.num_frames += len(episode)
        self.manifest.num_tasks = len(self._tasks)
        self.manifest.episode_seeds.append(seed)
        self._use_seed(seed, episode.is_success)
        if self._num_open_frames >= self._segment_frames or self._images.num_bytes >= self._segment_bytes:
            self.commit()

    def drop_episode(self, seed: int) -> None:
        """Notes that the seed was played and its episode, which failed, is not kept."""
        self._use_seed(seed, is_success=False)

    def commit(self, *, is_complete: bool = False) -> None:
        """Writes the open segment and then the manifest: from here on the episodes survive anything."""
        if self._episode_rows:
            self._write_segment(self.manifest.num_segments)
            self.manifest.num_segments += 1
            self._write_metadata()
            self._images.clear()
            for values in self._columns.values():
                values.clear()
            self._episode_rows, self._segment_statistics = [], []
            self._first_frame = self.manifest.num_frames
        self.manifest.is_complete = is_complete
        self.manifest.save(self.root)
        if is_complete:
            shutil.rmtree(self.root / SCRATCH, ignore_errors=True)

    @property
    def _num_open_frames(self) -> int:
        return self.manifest.num_frames - self._first_frame

    def _use_seed(self, seed: int, is_success: bool) -> None:
        self.manifest.next_seed = seed + 1
        if not is_success:
            self.manifest.failed_seeds.append(seed)

    # -- one episode ----------------------------------------------------------------------------------------------

    def _episode_columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """All columns but the images, (T,) or (T, D)."""
        length = len(episode)
        frame_index = np.arange(length)
        task_index = self._tasks.setdefault(episode.task, len(self._tasks))
        columns = {
            OBS_STATE: episode.states,
            ACTION: episode.actions,
            "timestamp": frame_index / self.layout.fps,
            "frame_index": frame_index,
            "episode_index": np.full(length, self.manifest.num_episodes),
            "index": self.manifest.num_frames + frame_index,
            "task_index": np.full(length, task_index),
        }
        return {key: columns[key] for key in self._columns}

    def _episode_row(self, episode: Episode, statistics: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
        """The episode's row in `meta/episodes`."""
        first, length = self.manifest.num_frames, len(episode)
        chunk, file = _chunk_and_file(self.manifest.num_segments)
        place = {"chunk_index": chunk, "file_index": file}
        row: dict[str, Any] = {"episode_index": self.manifest.num_episodes, "tasks": [episode.task], "length": length}
        row |= {f"data/{key}": value for key, value in place.items()}
        row |= {"dataset_from_index": first, "dataset_to_index": first + length}
        if self.layout.use_video:
            row |= {f"videos/{OBS_IMAGE}/{key}": value for key, value in place.items()}
            row[f"videos/{OBS_IMAGE}/from_timestamp"] = (first - self._first_frame) / self.layout.fps
            row[f"videos/{OBS_IMAGE}/to_timestamp"] = (first - self._first_frame + length) / self.layout.fps
        row |= {key: value.tolist() for key, value in flatten_dict({"stats": statistics}).items()}
        return row | {f"meta/episodes/{key}": value for key, value in place.items()}

    # -- one segment ----------------------------------------------------------------------------------------------

    def _segment_path(self, pattern: str, segment: int) -> Path:
        chunk, file = _chunk_and_file(segment)
        return self.root / pattern.format(video_key=OBS_IMAGE, chunk_index=chunk, file_index=file)

    def _write_segment(self, segment: int) -> None:
        arrays = []
        for field in self._schema:
            if field.name == OBS_IMAGE:
                assert isinstance(self._images, PngColumn)
                arrays.append(pa.array(self._images.rows, type=field.type))
            else:
                arrays.append(_arrow_array(np.concatenate(self._columns[field.name]), field.type))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        data_path = self._segment_path(DEFAULT_DATA_PATH, segment)
        write_whole(data_path, lambda path: write_table_one_row_group_per_episode(table, path))
        if isinstance(self._images, PngFolder):
            images = self._images
            video_path = self._segment_path(DEFAULT_VIDEO_PATH, segment)
            write_whole(video_path, lambda path: images.encode(path, self.layout.fps))
        rows = pa.Table.from_pylist(self._episode_rows)
        episodes_path = self._segment_path(DEFAULT_EPISODES_PATH, segment)
        write_whole(episodes_path, lambda path: pq.write_table(rows, path))

    # -- the dataset ----------------------------------------------------------------------------------------------

    def _write_metadata(self) -> None:
        """Tasks, statistics and info, of all segments including the open one."""
        known = [] if self._statistics is None else [self._statistics]
        self._statistics = aggregate_stats(known + self._segment_statistics)
        self._write_tasks()
        write_json_whole(self.root / STATS_PATH, serialize_dict(self._statistics))
        self._write_info()

    def _write_tasks(self) -> None:
        names = pd.Index(list(self._tasks), name="task")
        tasks = pd.DataFrame({"task_index": list(self._tasks.values())}, index=names)
        write_whole(self.root / DEFAULT_TASKS_PATH, tasks.to_parquet)

    def _write_info(self) -> None:
        features = self.layout.features()
        if self.layout.use_video and self.manifest.num_segments:
            if self._video_info is None:
                first_video = self._segment_path(DEFAULT_VIDEO_PATH, 0)
                self._video_info = get_video_info(first_video, video_encoder=rgb_encoder_defaults())
            features[OBS_IMAGE]["info"] = self._video_info
        info = create_empty_dataset_info(
            CODEBASE_VERSION, self.layout.fps, features, self.layout.use_video, self.layout.robot_type
        )
        info.total_episodes = self.manifest.num_episodes
        info.total_frames = self.manifest.num_frames
        info.total_tasks = self.manifest.num_tasks
        info.splits = {"train": f"0:{self.manifest.num_episodes}"}
        write_json_whole(self.root / INFO_PATH, info.to_dict())

    def _roll_back(self) -> None:
        """Makes the folder hold exactly what the manifest says, and takes up from there."""
        self.manifest.save(self.root)
        shutil.rmtree(self.root / SCRATCH, ignore_errors=True)
        patterns = (DEFAULT_DATA_PATH, DEFAULT_EPISODES_PATH, DEFAULT_VIDEO_PATH)
        committed = range(self.manifest.num_segments)
        expected = {self._segment_path(pattern, segment) for pattern in patterns for segment in committed}
        for folder in ("data", "meta/episodes", "videos"):
            for path in (self.root / folder).rglob("*"):
                if path.is_file() and path not in expected:
                    path.unlink()
        episodes = [pq.read_table(self._segment_path(DEFAULT_EPISODES_PATH, segment)) for segment in committed]
        for table in episodes:
            for (task,) in table.column("tasks").to_pylist():
                self._tasks.setdefault(task, len(self._tasks))
        assert len(self._tasks) == self.manifest.num_tasks
        if episodes:
            self._statistics = aggregate_stats([row for table in episodes for row in read_statistics(table)])
            self._write_tasks()
            write_json_whole(self.root / STATS_PATH, serialize_dict(self._statistics))
        self._write_info()


def _chunk_and_file(segment: int) -> tuple[int, int]:
    return divmod(segment, DEFAULT_CHUNK_SIZE)


def _arrow_array(values: np.ndarray, arrow_type: pa.DataType) -> pa.Array:
    """(T,) or (T, D) -> an Arrow column of `arrow_type`."""
    if values.ndim == 1:
        return pa.array(values).cast(arrow_type)
    flat = pa.array(values.reshape(-1)).cast(arrow_type.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)
