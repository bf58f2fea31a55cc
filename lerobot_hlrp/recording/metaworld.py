"""Meta-World with its own scripted experts, behind the very wrapper that `lerobot-eval` shows to a policy.

Two things to know. Meta-World 3.0.0 runs with MuJoCo up to 3.16 (3.17 widened `eq_data`, which it writes by hand). And
once one of its environments has been collected as garbage, the next one in the process renders black: keep them all.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from typing import Any

import numpy as np

from hlrp_core.expectation import expect_choice
from lerobot_hlrp.recording.episode import ExpertEnv

_FIRST_UNFIT_MUJOCO = (3, 17)


def make_expert_envs(tasks: str, gym_kwargs: dict[str, Any]) -> tuple[list[str], list[ExpertEnv]]:
    """Task names and their environments, in order.

    Args:
        tasks: as `--env.task` takes them: task names and difficulty groups, separated by commas.
        gym_kwargs: for LeRobot's `MetaworldEnv`.

    Raises ValueError for a task that is not there, and where Meta-World cannot run or cannot render.
    """
    _require_mujoco()
    os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
    from lerobot.envs.metaworld import DIFFICULTY_TO_TASKS, TASK_DESCRIPTIONS, MetaworldEnv

    class MetaworldExpertEnv(MetaworldEnv):
        """Keeps the simulator's full observation, of which the policy sees the first four numbers."""

        def _format_raw_obs(self, raw_obs: np.ndarray) -> Any:
            self._raw_obs = raw_obs
            return super()._format_raw_obs(raw_obs)

        def expert_action(self) -> np.ndarray:
            with warnings.catch_warnings():  # it says on every step that its actions exceed [-1, 1]
                warnings.simplefilter("ignore", UserWarning)
                return self.expert_policy.get_action(self._raw_obs)

    names: list[str] = []
    for group in tasks.split(","):
        names += DIFFICULTY_TO_TASKS.get(group.strip(), [group.strip().removeprefix("metaworld-")])
    for name in names:
        if name not in TASK_DESCRIPTIONS:
            expect_choice("--env.task", name, [*DIFFICULTY_TO_TASKS, *sorted(TASK_DESCRIPTIONS)])
    envs: list[ExpertEnv] = [MetaworldExpertEnv(task=name, **gym_kwargs) for name in names]
    try:
        envs[0].reset(seed=0)
    except Exception as error:  # MuJoCo's and OpenGL's own errors have no common class
        raise ValueError(
            f"Meta-World: expected off-screen OpenGL for MuJoCo, got {type(error).__name__}: {error} "
            f"(MUJOCO_GL={os.environ['MUJOCO_GL']}). Next step: Without a display, use MUJOCO_GL=egl with the system "
            "packages libegl1 libgl1 libgl1-mesa-dri (Debian, Ubuntu), or MUJOCO_GL=osmesa with libosmesa6."
        ) from error
    return names, envs


def _require_mujoco() -> None:
    try:
        importlib.metadata.version("metaworld")
        found = importlib.metadata.version("mujoco")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"--env.type=metaworld: expected the package {error.name}, got none. "
            "Next step: Install it: pip install 'lerobot_policy_hlrp[metaworld]'"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if version >= _FIRST_UNFIT_MUJOCO:
        raise ValueError(
            f"--env.type=metaworld: Meta-World 3.0.0 expects mujoco before 3.17, got {found}. "
            "Next step: Install it: pip install 'mujoco<3.17'"
        )
