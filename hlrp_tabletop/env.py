"""The tabletop as a `gymnasium.Env`."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from hlrp_tabletop.expert import expert_action
from hlrp_tabletop.physics import move_and_push, move_over
from hlrp_tabletop.rendering import Renderer, caption_image
from hlrp_tabletop.scene import MAX_OBJECTS, MIN_OBJECTS, OBJECT_RADIUS, Scene, sample_scene
from hlrp_tabletop.tasks import (
    INSTRUCTION_MODES,
    PHRASINGS,
    TEMPLATES,
    TIERS,
    Task,
    instruction_text,
    require_choice,
)

FPS = 10
MAX_STEP = 0.1  # world units per step and axis at full action
EPISODE_LENGTH = {"reach": 25, "push": 60}


class TabletopEnv(gym.Env[dict[str, Any], np.ndarray]):
    """One random tabletop scene and one instruction per episode.

    Observation: `pixels` (image_size, image_size, 3) uint8, and `agent_pos` (2,) float32, the gripper's x and y in
    [-1, 1]. Where the objects are is in the picture only. Action: (2,) float32 in [-1, 1], the gripper's move in units
    of `MAX_STEP`. Reward: 1 on success, else 0. `info["is_success"]` is there in every step.

    tier "reach": bring the gripper within the named object's radius. The first object touched decides: touching another
    one ends the episode without success, so that visiting all of them is no strategy.
    tier "push": bring the named object's centre within its own radius of the named corner's centre.

    instructions: "true"; "shuffled" (the text names another object of the scene, success is judged by the original
    task); "none" (the text is empty). One seed gives the same scene and task in all three.
    phrasing: "fixed" uses one sentence per tier, "varied" draws one of four.
    num_objects: 3 to 6 (3 when pushing: more leave no room).
    episode_length: steps until truncation, None for the tier's own.
    Raises ValueError for arguments outside of these.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        tier: str = "reach",
        *,
        instructions: str = "true",
        phrasing: str = "fixed",
        num_objects: int = 3,
        image_size: int = 96,
        episode_length: int | None = None,
        render_mode: str | None = "rgb_array",
        render_size: int = 384,
    ):
        require_choice("tier", tier, TIERS)
        require_choice("instructions", instructions, INSTRUCTION_MODES)
        require_choice("phrasing", phrasing, PHRASINGS)
        require_choice("render_mode", render_mode or "rgb_array", ("rgb_array",))
        if not MIN_OBJECTS <= num_objects <= MAX_OBJECTS[tier]:
            limits = f"{MIN_OBJECTS} to {MAX_OBJECTS[tier]}"
            raise ValueError(
                f"num_objects: expected {limits} for tier {tier!r}, got {num_objects}. Next step: Use {MIN_OBJECTS}."
            )
        if image_size < 16:
            raise ValueError(f"image_size: expected at least 16 pixels, got {image_size}. Next step: Use 96.")
        if episode_length is not None and episode_length < 1:
            raise ValueError(
                f"episode_length: expected at least 1 step, got {episode_length}. Next step: Leave it out."
            )
        self.tier = tier
        self.instructions = instructions
        self.phrasing = phrasing
        self.num_objects = num_objects
        self.render_mode = render_mode
        self.task = tier  # LeRobot asks for `task` and `task_description`
        self._max_episode_steps = EPISODE_LENGTH[tier] if episode_length is None else episode_length
        self._renderer = Renderer(image_size)
        self._video_renderer = Renderer(render_size)
        self._num_steps = 0
        self._scene: Scene | None = None
        self._episode_task: Task | None = None
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "agent_pos": spaces.Box(-1.0, 1.0, (2,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    @property
    def scene(self) -> Scene:
        """The world state, for experts and tests; no part of the observation."""
        if self._scene is None:
            raise gym.error.ResetNeeded("The tabletop has no scene yet: call reset() first.")
        return self._scene

    @property
    def episode_task(self) -> Task:
        """What success means in this episode."""
        if self._episode_task is None:
            raise gym.error.ResetNeeded("The tabletop has no task yet: call reset() first.")
        return self._episode_task

    @property
    def task_description(self) -> str:
        """The instruction that the policy is given."""
        return "" if self._episode_task is None else self._episode_task.instruction

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self._scene = sample_scene(self.np_random, self.tier, self.num_objects)
        self._episode_task = self._sample_task(self._scene)
        self._num_steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        scene, task = self.scene, self.episode_task
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(
                f"action: expected 2 finite numbers in [-1, 1], got {action}. Next step: Pass one action, of shape "
                "(2,), and look for NaN in what predicts it."
            )
        delta = np.clip(action, -1.0, 1.0) * MAX_STEP
        if self.tier == "reach":
            scene.gripper = move_over(scene.gripper, delta)
        else:
            scene.gripper, scene.positions = move_and_push(scene.gripper, scene.positions, delta)
        self._num_steps += 1
        is_success, is_over = self._judge(scene, task)
        truncated = not is_over and self._num_steps >= self._max_episode_steps
        return self._observation(), float(is_success), is_over, truncated, {"is_success": is_success}

    def render(self) -> np.ndarray:
        """The scene at `render_size` with the instruction below it, (render_size + 48, render_size, 3) uint8."""
        return caption_image(self._video_renderer.draw(self.scene), self.task_description)

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, (2,) float32. It knows the true task, whatever the words say."""
        return expert_action(self.scene, self.episode_task, MAX_STEP)

    def _sample_task(self, scene: Scene) -> Task:
        """Draws the task. Always consumes the same random numbers, so that modes share scenes and tasks."""
        rng = self.np_random
        target = int(rng.integers(scene.num_objects))
        other = (target + 1 + int(rng.integers(scene.num_objects - 1))) % scene.num_objects
        template = int(rng.integers(len(TEMPLATES[self.tier])))
        place = int(rng.choice(np.flatnonzero(scene.feasible[target]))) if self.tier == "push" else None
        spoken = other if self.instructions == "shuffled" else target
        text = ""
        if self.instructions != "none":
            place_name = None if place is None else scene.place_name(place)
            text = instruction_text(
                self.tier, scene.object_name(spoken), place_name, template if self.phrasing == "varied" else 0
            )
        return Task(self.tier, target, place, spoken, text)

    def _judge(self, scene: Scene, task: Task) -> tuple[bool, bool]:
        """(is_success, is_over)."""
        if task.place is None:
            touched = np.linalg.norm(scene.positions - scene.gripper, axis=-1) <= OBJECT_RADIUS
            return bool(touched[task.target]), bool(touched.any())
        distance = np.linalg.norm(scene.positions[task.target] - scene.place_positions[task.place])
        is_success = bool(distance <= OBJECT_RADIUS)
        return is_success, is_success

    def _observation(self) -> dict[str, Any]:
        return {"pixels": self._renderer.draw(self.scene), "agent_pos": self.scene.gripper.astype(np.float32)}
