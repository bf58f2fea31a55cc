"""The scripted expert: from the full world state to the next action, without memory.

Reaching is a straight line. Pushing replans at every step: go behind the object (seen from the place) by the shortest
way around all objects, then push, always keeping the object between gripper and place.
"""

import numpy as np

from hlrp_tabletop.scene import CONTACT_DISTANCE, Scene, distance_to_segments
from hlrp_tabletop.tasks import Task

_MARGIN = 0.03  # kept between gripper and objects on the way
_NUM_WAYPOINTS = 12  # around each object
_PUSH_STEP = 0.09  # how far the object is pushed per step
_ANGLES = np.linspace(0, 2 * np.pi, _NUM_WAYPOINTS, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=-1)


def expert_action(scene: Scene, task: Task, max_step: float) -> np.ndarray:
    """The next action, (2,) float32 in [-1, 1]; one unit moves the gripper by `max_step`."""
    goal = scene.positions[task.target] if task.tier == "reach" else _push_goal(scene, task)
    return _action_towards(goal - scene.gripper, max_step)


def _action_towards(offset: np.ndarray, max_step: float) -> np.ndarray:
    """Full speed along `offset`, or exactly `offset` where that is within one step. Keeps the direction."""
    action = offset / max_step
    return (action / max(1.0, float(np.abs(action).max()))).astype(np.float32)


def _push_goal(scene: Scene, task: Task) -> np.ndarray:
    """Where the gripper should go next, (2,)."""
    assert task.place is not None
    position = scene.positions[task.target]
    way = scene.place_positions[task.place] - position
    direction = way / max(float(np.linalg.norm(way)), 1e-9)
    offset = position - scene.gripper
    distance = float(np.linalg.norm(offset))
    is_behind = float(offset @ direction) > 0.85 * distance
    if is_behind and distance < CONTACT_DISTANCE + 0.12:
        return position + direction * (_PUSH_STEP - CONTACT_DISTANCE)
    behind = position - direction * (CONTACT_DISTANCE + _MARGIN + 0.01)
    return _next_waypoint(scene.gripper, np.clip(behind, -1.0, 1.0), scene.positions)


def _next_waypoint(start: np.ndarray, goal: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """First corner of the shortest way from start to goal around the obstacles (N, 2); the goal if there is none."""
    radius = CONTACT_DISTANCE + _MARGIN
    if _is_free(start, goal, obstacles, radius).all():
        return goal
    # The chords between neighbouring waypoints must stay outside the circle.
    ring = (radius + 0.01) / np.cos(np.pi / _NUM_WAYPOINTS)
    waypoints = (obstacles[:, None] + ring * _CIRCLE).reshape(-1, 2)  # (N * 12, 2)
    waypoints = waypoints[(np.abs(waypoints) <= 1.0).all(-1)]
    gaps = np.linalg.norm(waypoints[:, None] - obstacles, axis=-1)
    waypoints = waypoints[(gaps > radius).all(-1)]
    nodes = np.concatenate([goal[None], waypoints, start[None]])
    cost = np.linalg.norm(nodes[:, None] - nodes, axis=-1)
    cost[~_is_free(nodes[:, None], nodes[None], obstacles, radius)] = np.inf
    to_goal = cost[:, 0]
    for _ in range(_NUM_WAYPOINTS):  # shortest ways of up to 12 more corners, by relaxation
        to_goal = np.minimum(to_goal, (cost + to_goal).min(-1))
    choice = cost[-1] + to_goal
    choice[-1] = np.inf
    best = int(choice.argmin())
    return nodes[best] if np.isfinite(choice[best]) else goal


def _is_free(starts: np.ndarray, ends: np.ndarray, obstacles: np.ndarray, radius: float) -> np.ndarray:
    """Whether segments (..., 2) -> (..., 2) keep out of all circles; one that starts inside a circle may leave it."""
    starts, ends = np.broadcast_arrays(starts[..., None, :], ends[..., None, :])  # (..., 1, 2)
    clearance = distance_to_segments(obstacles, starts, ends)
    from_start = np.linalg.norm(obstacles - starts, axis=-1)
    leaves = clearance >= from_start - 1e-9
    return ((clearance > radius) | leaves).all(-1)
