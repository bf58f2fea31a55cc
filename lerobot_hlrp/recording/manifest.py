"""`meta/hlrp_recording.json`: how a dataset was recorded, from which seeds, and how far recording has come.

Writing this file is what commits a segment of the dataset: whatever else lies in the folder beyond it is the rest of an
interrupted run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lerobot_hlrp.recording.files import write_json_whole

MANIFEST_PATH = Path("meta") / "hlrp_recording.json"
SCHEMA_VERSION = 1
# Environments are recorded from this seed on; `lerobot-eval` and `lerobot-train` evaluate from 1000 by default.
FIRST_RECORDING_SEED = 1_000_000


@dataclass
class Manifest:
    """settings: whatever the frames depend on. num_segments, num_episodes, num_frames, num_tasks: what is committed.
    first_seed and next_seed: environment seeds in [first_seed, next_seed) are used up, by kept and dropped episodes.
    episode_seeds: of the kept episodes, in order. failed_seeds: of those without success. is_complete: as asked for."""

    settings: dict[str, Any]
    first_seed: int
    next_seed: int
    num_segments: int = 0
    num_episodes: int = 0
    num_frames: int = 0
    num_tasks: int = 0
    episode_seeds: list[int] = field(default_factory=list)
    failed_seeds: list[int] = field(default_factory=list)
    is_complete: bool = False

    def save(self, root: Path) -> None:
        write_json_whole(root / MANIFEST_PATH, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """Raises ValueError if the folder is no recording, or one of another version, or its manifest is damaged."""
        path = root / MANIFEST_PATH
        if not path.is_file():
            raise ValueError(
                f"--dataset.root={root}: expected a new folder, or one that hlrp-record began; got a folder without "
                f"{MANIFEST_PATH}. Next step: Choose another folder, or delete this one."
            )
        try:
            content = json.loads(path.read_text())
            version = content.pop("schema_version", None)
        except (ValueError, AttributeError, TypeError) as error:  # no text, no JSON, no object
            raise _damaged(path, error) from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: expected schema version {SCHEMA_VERSION}, got {version}. Next step: Record it anew."
            )
        try:
            return cls(**content)
        except TypeError as error:
            raise _damaged(path, error) from error

    def require_settings(self, settings: dict[str, Any], root: Path) -> None:
        """Raises ValueError if the folder was recorded with other settings, and names them."""
        names = [name for name in sorted(self.settings | settings) if self.settings.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(
                f"{name}: expected {self.settings.get(name)!r}, got {settings.get(name)!r}" for name in names
            )
            raise ValueError(
                f"{root} was begun with other settings ({differences}). Next step: Repeat the command it was begun "
                "with to go on, or choose another --dataset.root."
            )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: expected the manifest of a recording, got a damaged file ({error}). Next step: Copy the dataset "
        "anew, or record into another --dataset.root."
    )
