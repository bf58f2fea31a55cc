"""The world state of the tabletop and how a random one is drawn.

World coordinates: x to the right, y up, the gripper moves in [-1, 1] on both axes; one unit is half the table.
Shapes: N objects, M places (0 when reaching, the 4 corners when pushing), K candidates drawn at once.
"""

from dataclasses import dataclass

import numpy as np

from hlrp_tabletop.tasks import COLOUR_NAMES, SHAPE_NAMES

OBJECT_RADIUS = 0.19
GRIPPER_RADIUS = 0.075
CONTACT_DISTANCE = OBJECT_RADIUS + GRIPPER_RADIUS
CORNER = 0.74  # |x| and |y| of a corner's centre
MIN_OBJECTS = 3
MAX_OBJECTS = {"reach": len(COLOUR_NAMES), "push": 3}  # more leave no room to push

_REACH_EXTENT = 0.80  # objects lie within +-extent
_PUSH_EXTENT = 0.50
_START_EXTENT = 0.90
_GAP = 0.08  # free table between two objects
_PATH_CLEARANCE = 0.06  # between an object's edge and the straight way to any other object
_START_CLEARANCE = 0.20  # between the start and an object's edge
_CORNERS = np.array([[-CORNER, CORNER], [CORNER, CORNER], [-CORNER, -CORNER], [CORNER, -CORNER]])
_CANDIDATES = 64
_MAX_BATCHES = 1000


@dataclass
class Scene:
    """Everything the picture shows.

    gripper: (2,) float64. positions: (N, 2) float64, centres. colours, shapes: (N,) int, indices into COLOUR_NAMES and
    SHAPE_NAMES. place_positions: (M, 2) float64. place_colours: (M,) int. feasible: (N, M) bool, whether an object can
    be pushed to a place in a straight line.
    """

    gripper: np.ndarray
    positions: np.ndarray
    colours: np.ndarray
    shapes: np.ndarray
    place_positions: np.ndarray
    place_colours: np.ndarray
    feasible: np.ndarray

    @property
    def num_objects(self) -> int:
        return len(self.positions)

    def object_name(self, index: int) -> str:
        return f"{COLOUR_NAMES[self.colours[index]]} {SHAPE_NAMES[self.shapes[index]]}"

    def place_name(self, index: int) -> str:
        return f"{COLOUR_NAMES[self.place_colours[index]]} corner"


def sample_scene(rng: np.random.Generator, tier: str, num_objects: int) -> Scene:
    """Draws object set, colours, places, positions and start pose."""
    colours = rng.permutation(len(COLOUR_NAMES))[:num_objects]
    shapes = rng.integers(len(SHAPE_NAMES), size=num_objects)
    if tier == "reach":
        gripper, positions = _sample_reach_layout(rng, num_objects)
        places, place_colours = np.zeros((0, 2)), np.zeros(0, dtype=int)
        feasible = np.zeros((num_objects, 0), dtype=bool)
    else:
        place_colours = rng.permutation(len(COLOUR_NAMES))[: len(_CORNERS)]
        places = _CORNERS
        gripper, positions, feasible = _sample_push_layout(rng, num_objects)
    return Scene(gripper, positions, colours, shapes, places, place_colours, feasible)


def distance_to_segments(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Distance from points to segments; all (..., 2), broadcast against each other."""
    along = ends - starts
    squared_length = np.maximum((along * along).sum(-1), 1e-12)
    fraction = np.clip(((points - starts) * along).sum(-1) / squared_length, 0.0, 1.0)
    return np.linalg.norm(points - starts - fraction[..., None] * along, axis=-1)


def _sample_reach_layout(rng: np.random.Generator, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Start (2,) and positions (N, 2) such that the straight way to each object touches no other object.

    The condition is symmetric in the objects: nothing but the words tells which of them is meant.
    """
    for _ in range(_MAX_BATCHES):
        starts = rng.uniform(-_START_EXTENT, _START_EXTENT, (_CANDIDATES, 1, 2))
        positions = rng.uniform(-_REACH_EXTENT, _REACH_EXTENT, (_CANDIDATES, num_objects, 2))
        others = ~np.eye(num_objects, dtype=bool)
        # way[k, i, j]: distance of object j from the segment start -> object i
        way = distance_to_segments(positions[:, None], starts[:, None], positions[:, :, None])
        clear = (way > OBJECT_RADIUS + _PATH_CLEARANCE) | ~others
        start_distance = np.linalg.norm(positions - starts, axis=-1)
        valid = (
            _is_spread(positions)
            & clear.all(axis=(1, 2))
            & (start_distance > OBJECT_RADIUS + _START_CLEARANCE).all(axis=1)
        )
        if valid.any():
            chosen = int(valid.argmax())
            return starts[chosen, 0], positions[chosen]
    raise RuntimeError(f"No layout for {num_objects} objects in {_MAX_BATCHES * _CANDIDATES} draws.")


def _sample_push_layout(rng: np.random.Generator, num_objects: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start (2,), positions (N, 2) and feasible (N, M), such that every object can be pushed to two places or more."""
    for _ in range(_MAX_BATCHES):
        starts = rng.uniform(-_START_EXTENT, _START_EXTENT, (_CANDIDATES, 1, 2))
        positions = rng.uniform(-_PUSH_EXTENT, _PUSH_EXTENT, (_CANDIDATES, num_objects, 2))
        feasible = _feasible_pushes(positions)
        start_distance = np.linalg.norm(positions - starts, axis=-1)
        valid = (
            _is_spread(positions)
            & (feasible.sum(-1) >= 2).all(axis=1)
            & (start_distance > CONTACT_DISTANCE + 0.05).all(axis=1)
        )
        if valid.any():
            chosen = int(valid.argmax())
            return starts[chosen, 0], positions[chosen], feasible[chosen]
    raise RuntimeError(f"No layout for {num_objects} objects in {_MAX_BATCHES * _CANDIDATES} draws.")


def _feasible_pushes(positions: np.ndarray) -> np.ndarray:
    """(K, N, 2) -> (K, N, M): neither the object's way to the place nor the gripper's room behind it is taken."""
    objects = positions[:, :, None]  # (K, N, 1, 2)
    ways = _CORNERS - objects  # (K, N, M, 2)
    directions = ways / np.linalg.norm(ways, axis=-1, keepdims=True)
    behind = objects - directions * (CONTACT_DISTANCE + 0.02)
    others = positions[:, None, None]  # (K, 1, 1, N, 2)
    self_mask = np.eye(positions.shape[1], dtype=bool)[None, :, None]  # (1, N, 1, N)
    way_distance = distance_to_segments(others, objects[..., None, :], (objects + ways)[..., None, :])
    behind_distance = np.linalg.norm(others - behind[..., None, :], axis=-1)
    free = (way_distance > 2 * OBJECT_RADIUS + 0.02) & (behind_distance > CONTACT_DISTANCE + 0.03)
    return (free | self_mask).all(-1)


def _is_spread(positions: np.ndarray) -> np.ndarray:
    """(K, N, 2) -> (K,): no two objects closer than the gap."""
    distance = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
    distance += np.eye(positions.shape[1]) * 10
    return (distance > 2 * OBJECT_RADIUS + _GAP).all(axis=(1, 2))
