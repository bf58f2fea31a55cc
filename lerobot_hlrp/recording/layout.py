"""Which columns a recorded dataset has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_IMAGE, OBS_STATE


@dataclass(frozen=True)
class DatasetLayout:
    """robot_type: name in `info.json`. image_shape: (H, W, 3). state_names, action_names: one per dimension; an empty
    tuple leaves the column out. use_video: frames as video instead of PNG images in the data files."""

    robot_type: str
    fps: int
    image_shape: tuple[int, int, int]
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    use_video: bool

    def features(self) -> dict[str, dict[str, Any]]:
        """The `features` of `info.json`, LeRobot's own columns included."""
        features: dict[str, dict[str, Any]] = {
            OBS_IMAGE: {
                "dtype": "video" if self.use_video else "image",
                "shape": self.image_shape,
                "names": ["height", "width", "channels"],
            }
        }
        for key, names in ((OBS_STATE, self.state_names), (ACTION, self.action_names)):
            if names:
                features[key] = {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        return features | {key: dict(feature) for key, feature in DEFAULT_FEATURES.items()}
