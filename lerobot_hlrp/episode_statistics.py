"""Statistics of single episodes: they are in a dataset's files, but LeRobot leaves them out of `meta.episodes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata


def read_episode_statistics(
    meta: LeRobotDatasetMetadata,
    *,
    keys: Sequence[str] | None = None,
    statistics: Sequence[str] | None = None,
    episodes: Sequence[int] | None = None,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Episode -> feature -> statistic -> value (nested lists), in the order of the episodes.

    Args:
        keys: features to read; by default all.
        statistics: to read, such as `mean`; by default all.
        episodes: to read; by default all.
    """
    import pyarrow.dataset as pa_dataset

    files = pa_dataset.dataset(meta.root / "meta" / "episodes", format="parquet")
    columns = {name: name.split("/")[1:] for name in files.schema.names if name.startswith("stats/")}
    if keys is not None:
        columns = {name: parts for name, parts in columns.items() if parts[0] in keys}
    if statistics is not None:
        columns = {name: parts for name, parts in columns.items() if parts[1] in statistics}
    chosen = None if episodes is None else pa_dataset.field("episode_index").isin(list(episodes))
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in files.to_table(columns=["episode_index", *columns], filter=chosen).to_pylist():
        of_episode = found.setdefault(row["episode_index"], {})
        for name, (key, statistic) in columns.items():
            of_episode.setdefault(key, {})[statistic] = row[name]
    return dict(sorted(found.items()))
