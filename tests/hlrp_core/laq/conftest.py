"""A world in which only motion matters: a bright square moves over a dark ground."""

from __future__ import annotations

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from hlrp_core.laq.pairs import FrameTuples, tuple_starts

SIZE, SPEED = 32, 3


def moving_squares(num_episodes: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames `[N, 32, 32, 3]` uint8, and each frame's action `[N, 2]`: one of four directions an episode."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_episodes * length, SIZE, SIZE, 3), 40, dtype=np.uint8)
    actions = np.zeros((len(frames), 2), dtype=np.float32)
    for episode in range(num_episodes):
        direction = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)][rng.integers(4)])
        corner = rng.integers(10, 17, size=2)
        for step in range(length):
            row, column = np.clip(corner + SPEED * step * direction, 0, SIZE - 6)
            index = episode * length + step
            frames[index, row : row + 6, column : column + 6] = 220
            actions[index] = direction
    return frames, actions


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps its precision for a process's whole life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def square_tuples() -> tuple[FrameTuples, FrameTuples]:
    """Training and held-out pairs (t, t+1)."""
    made = []
    for seed, episodes in ((0, 200), (1, 60)):
        frames, actions = moving_squares(episodes, 4, seed)
        starts = np.concatenate(tuple_starts([4] * episodes, frame_gap=1))
        made.append(FrameTuples(frames, starts, 1, motion=actions[starts]))
    return made[0], made[1]
