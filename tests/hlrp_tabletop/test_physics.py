"""Pushing: nothing overlaps, nothing leaves the table, nothing moves untouched."""

from __future__ import annotations

import numpy as np
import pytest

from hlrp_tabletop.physics import move_and_push, move_over
from hlrp_tabletop.scene import CONTACT_DISTANCE, OBJECT_RADIUS


def test_an_object_straight_ahead_is_pushed_straight_ahead():
    gripper, positions = move_and_push(np.array([-0.3, 0.0]), np.array([[0.0, 0.0]]), np.array([0.1, 0.0]))
    np.testing.assert_allclose(gripper, [-0.2, 0.0])
    np.testing.assert_allclose(positions, [[-0.2 + CONTACT_DISTANCE, 0.0]], atol=1e-9)


def test_an_object_hit_off_centre_slides_aside():
    _, positions = move_and_push(np.array([-0.26, 0.1]), np.array([[0.0, 0.0]]), np.array([0.1, 0.0]))
    assert positions[0, 0] > 0.03
    assert positions[0, 1] < -0.01


def test_what_is_not_touched_stays():
    start = np.array([[0.0, 0.0], [0.5, 0.5]])
    _, positions = move_and_push(np.array([-0.8, 0.0]), start, np.array([0.1, 0.1]))
    np.testing.assert_array_equal(positions, start)


def test_the_arguments_are_not_changed():
    gripper, positions = np.array([-0.2, 0.0]), np.array([[0.0, 0.0]])
    move_and_push(gripper, positions, np.array([0.1, 0.0]))
    np.testing.assert_array_equal(gripper, [-0.2, 0.0])
    np.testing.assert_array_equal(positions, [[0.0, 0.0]])


def test_an_object_at_the_edge_holds_the_gripper():
    edge = 1 - OBJECT_RADIUS
    gripper, positions = np.array([edge - CONTACT_DISTANCE - 0.01, 0.0]), np.array([[edge, 0.0]])
    for _ in range(5):
        gripper, positions = move_and_push(gripper, positions, np.array([0.1, 0.0]))
    np.testing.assert_allclose(positions, [[edge, 0.0]])
    np.testing.assert_allclose(gripper, [edge - CONTACT_DISTANCE, 0.0])


def test_a_pushed_object_pushes_another():
    positions = np.array([[0.0, 0.0], [2 * OBJECT_RADIUS, 0.0]])
    _, after = move_and_push(np.array([-CONTACT_DISTANCE, 0.0]), positions, np.array([0.1, 0.0]))
    assert after[1, 0] > positions[1, 0] + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_objects_never_overlap_much_nor_leave_the_table(seed: int):
    rng = np.random.default_rng(seed)
    gripper, positions = np.array([-0.9, -0.9]), np.array([[-0.4, 0.0], [0.1, 0.1], [0.5, -0.2]])
    for _ in range(400):
        delta = 0.1 * np.clip(rng.normal(size=2) + 0.8 * np.sign(positions[0] - gripper), -1, 1)
        gripper, positions = move_and_push(gripper, positions, delta)
        gaps = np.linalg.norm(positions[:, None] - positions, axis=-1) + 10 * np.eye(3)
        assert gaps.min() > 2 * OBJECT_RADIUS - 0.03
        assert (np.abs(positions) <= 1 - OBJECT_RADIUS + 1e-9).all()
        assert (np.abs(gripper) <= 1).all()


def test_moving_over_stays_on_the_table():
    np.testing.assert_allclose(move_over(np.array([0.95, 0.0]), np.array([0.1, 0.1])), [1.0, 0.1])
