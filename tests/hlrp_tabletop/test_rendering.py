"""The picture: what is where, in which colour, and that the caches and bounding boxes change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from hlrp_tabletop import COLOURS, TIERS, TabletopEnv
from hlrp_tabletop.rendering import VIEW, Renderer, caption_image
from hlrp_tabletop.scene import GRIPPER_RADIUS
from hlrp_tabletop.tasks import COLOUR_NAMES, SHAPE_NAMES

both_tiers = pytest.mark.parametrize("tier", TIERS)


def reset(tier: str, seed: int, size: int = 96):
    env = TabletopEnv(tier, image_size=size)
    observation, _ = env.reset(seed=seed)
    return env, observation["pixels"]


@both_tiers
@pytest.mark.parametrize("size", [64, 96, 384])
def test_objects_appear_where_they_are_in_their_colour(tier: str, size: int):
    for seed in range(10):
        env, picture = reset(tier, seed, size)
        for position, colour in zip(env.scene.positions, env.scene.colours, strict=True):
            pixel = picture[Renderer(size).pixel_of(position)]
            np.testing.assert_array_equal(pixel, COLOURS[COLOUR_NAMES[colour]])


def test_up_is_up_and_right_is_right():
    renderer = Renderer(96)
    row, column = renderer.pixel_of(np.array([0.5, 0.8]))
    assert row < 48 < column
    assert renderer.pixel_of(np.array([-VIEW, VIEW])) == (0, 0)


@both_tiers
def test_gripper_is_a_dark_disc_with_a_bright_tip(tier: str):
    for seed in range(10):
        env, _ = reset(tier, seed)
        renderer = Renderer(384)
        picture = renderer.draw(env.scene).astype(int)
        body = env.scene.gripper + np.array([GRIPPER_RADIUS, 0.0])
        assert picture[renderer.pixel_of(body)].max() < 60
        assert picture[renderer.pixel_of(env.scene.gripper)].min() > 220


def test_gripper_can_be_told_from_any_background():
    """Moving the gripper by one full step changes the picture, over table, objects and places alike."""
    env, _ = reset("push", 0)
    for spot in (*env.scene.positions, *env.scene.place_positions, np.zeros(2)):
        env.scene.gripper = np.array(spot)
        here = env._observation()["pixels"].astype(int)
        env.scene.gripper = np.array(spot) + np.array([-0.1 if spot[0] > 0 else 0.1, 0.0])
        there = env._observation()["pixels"].astype(int)
        assert (np.abs(here - there).max(-1) > 60).sum() >= 10


def test_places_are_drawn_in_their_colour_and_pale_inside():
    env, picture = reset("push", 2, 384)
    env.scene.gripper = np.zeros(2)
    renderer = Renderer(384)
    picture = renderer.draw(env.scene)
    for position, colour in zip(env.scene.place_positions, env.scene.place_colours, strict=True):
        rgb = np.array(COLOURS[COLOUR_NAMES[colour]])
        np.testing.assert_array_equal(picture[renderer.pixel_of(position + np.array([-0.25, 0.0]))], rgb)
        inside = picture[renderer.pixel_of(position)].astype(int)
        assert inside.sum() > rgb.sum()


def test_shapes_look_different():
    env, _ = reset("reach", 0)
    env.scene.gripper = np.array([-0.9, -0.9])
    env.scene.positions = np.array([[0.0, 0.0], [0.7, 0.7], [-0.7, 0.7]])
    pictures = []
    for shape in range(len(SHAPE_NAMES)):
        env.scene.shapes = np.array([shape, 0, 0])
        pictures.append(env._observation()["pixels"].astype(int))
    for first in range(len(pictures)):
        for second in range(first):
            assert (np.abs(pictures[first] - pictures[second]).max(-1) > 100).sum() >= 20


@both_tiers
def test_a_renderer_with_a_history_draws_the_same(tier: str):
    env, _ = reset(tier, 0)
    used = Renderer(96)
    for seed in range(5):
        env.reset(seed=seed)
        for _ in range(12):
            np.testing.assert_array_equal(used.draw(env.scene), Renderer(96).draw(env.scene))
            if any(env.step(env.expert_action())[2:4]):
                break


def test_pictures_do_not_share_memory():
    env, picture = reset("reach", 0)
    before = picture.copy()
    picture_after = env.step(np.array([1.0, 1.0]))[0]["pixels"]
    np.testing.assert_array_equal(picture, before)
    assert not np.array_equal(picture, picture_after)


def test_figures_are_not_cut_off_by_their_bounding_box():
    """The naive twin: every figure evaluated over the whole picture."""
    env, picture = reset("push", 4)
    naive = Renderer(96)
    naive._window = lambda offset, reach: slice(0, 96)  # type: ignore[method-assign]
    np.testing.assert_array_equal(picture, naive.draw(env.scene))


@pytest.mark.parametrize("width", [256, 384])
def test_every_instruction_fits_below_the_picture(width: int):
    """Nothing touches the strip's edge, and every letter leaves a mark."""
    text = "shove the purple triangle into the yellow corner"
    strip = caption_image(np.zeros((8, width, 3), dtype=np.uint8), text)[8:]
    mask = strip.max(-1) < 60
    assert not mask[[0, -1]].any()
    assert not mask[:, [0, -1]].any()
    letters = sum(
        (caption_image(np.zeros((8, width, 3), dtype=np.uint8), letter)[8:].max(-1) < 60).sum() / 4
        for letter in text.replace(" ", "")
    )
    assert mask.sum() in (letters, 4 * letters)


def test_video_frame_carries_the_instruction():
    env = TabletopEnv("push", render_size=384)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (384 + 48, 384, 3)
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, caption_image(frame[:384], env.task_description))
    assert not np.array_equal(frame[384:], caption_image(frame[:384], "push the red disc")[384:])
    assert (frame[384:] < 60).any()
