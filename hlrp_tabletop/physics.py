"""Quasi-static pushing: discs without friction or inertia, moved out of each other.

The gripper moves in small substeps. After each, whatever it penetrates is pushed out along the line between the
centres, objects push each other likewise, and nothing leaves the table; a gripper whose object is stuck stops.
"""

import numpy as np

from hlrp_tabletop.scene import CONTACT_DISTANCE, OBJECT_RADIUS

_SUBSTEP = 0.025
_SWEEPS = 3
_OBJECT_LIMIT = 1.0 - OBJECT_RADIUS


def move_over(gripper: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Moves above the objects: (2,), (2,) -> (2,), kept on the table."""
    return np.clip(gripper + delta, -1.0, 1.0)


def move_and_push(gripper: np.ndarray, positions: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves on the table and pushes: gripper (2,), positions (N, 2), delta (2,) -> new gripper, new positions."""
    gripper, positions = gripper.copy(), positions.copy()
    num_substeps = max(1, int(np.ceil(np.abs(delta).max() / _SUBSTEP)))
    for _ in range(num_substeps):
        gripper = np.clip(gripper + delta / num_substeps, -1.0, 1.0)
        if (np.abs(positions - gripper) < CONTACT_DISTANCE).all(-1).any():
            gripper, positions = _separate(gripper, positions)
    return gripper, positions


def _separate(gripper: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(_SWEEPS):
        for index in range(len(positions)):
            positions[index] += _push_out(gripper, positions[index], CONTACT_DISTANCE)
        _separate_objects(positions)
        np.clip(positions, -_OBJECT_LIMIT, _OBJECT_LIMIT, out=positions)
    for position in positions:  # an object that cannot give way holds the gripper
        gripper = gripper + _push_out(position, gripper, CONTACT_DISTANCE)
    return np.clip(gripper, -1.0, 1.0), positions


def _separate_objects(positions: np.ndarray) -> None:
    """Moves overlapping objects apart, in place, each by half of the overlap."""
    for first in range(len(positions)):
        for second in range(first + 1, len(positions)):
            shift = 0.5 * _push_out(positions[first], positions[second], 2 * OBJECT_RADIUS)
            positions[first] -= shift
            positions[second] += shift


def _push_out(fixed: np.ndarray, moving: np.ndarray, distance: float) -> np.ndarray:
    """The shift (2,) that brings `moving` to `distance` from `fixed`, zero if it is that far already."""
    offset = moving - fixed
    length = float(np.hypot(offset[0], offset[1]))
    if length >= distance:
        return np.zeros(2)
    direction = offset / length if length > 1e-9 else np.array([1.0, 0.0])
    return direction * (distance - length)
