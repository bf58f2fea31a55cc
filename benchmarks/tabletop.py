"""Speed and difficulty of the tabletop: steps per second with rendering, and who succeeds how often.

    python benchmarks/tabletop.py --episodes 500 --output outputs/tabletop.json

Policies: the expert; the expert of the object that shuffled words name (what a policy that follows wrong words gets);
a nearest-object policy that ignores the words; one direction for ever; uniformly random actions.
(The blind ones that push are told the place, not the object.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import describe_machine, write_result

from hlrp_tabletop import TIERS, TabletopEnv
from hlrp_tabletop.env import MAX_STEP
from hlrp_tabletop.expert import expert_action

Policy = Callable[[TabletopEnv, np.random.Generator], np.ndarray]


def follow_words(env: TabletopEnv, _: np.random.Generator) -> np.ndarray:
    task = env.episode_task
    return expert_action(env.scene, replace(task, target=task.spoken), MAX_STEP)


def go_to_nearest(env: TabletopEnv, _: np.random.Generator) -> np.ndarray:
    distance = np.linalg.norm(env.scene.positions - env.scene.gripper, axis=-1)
    return expert_action(env.scene, replace(env.episode_task, target=int(distance.argmin())), MAX_STEP)


ONE_DIRECTION = np.array([0.7, 0.7])  # start poses are random, so any will do

POLICIES: dict[str, tuple[str, Policy]] = {
    "expert": ("true", lambda env, rng: env.expert_action()),
    "follows_shuffled_words": ("shuffled", follow_words),
    "nearest_object": ("none", go_to_nearest),
    "one_direction": ("none", lambda env, rng: ONE_DIRECTION),
    "random": ("none", lambda env, rng: rng.uniform(-1, 1, 2)),
}


def evaluate(tier: str, policy_name: str, num_episodes: int, start_seed: int) -> dict[str, float]:
    """Success rate and mean length over the seeds start_seed .. start_seed + num_episodes - 1."""
    instructions, policy = POLICIES[policy_name]
    env, rng = TabletopEnv(tier, instructions=instructions), np.random.default_rng(0)
    lengths, successes = [], []
    for episode in range(num_episodes):
        env.reset(seed=start_seed + episode)
        is_over, steps = False, 0
        while not is_over:
            _, _, terminated, truncated, info = env.step(policy(env, rng))
            is_over, steps = terminated or truncated, steps + 1
        lengths.append(steps)
        successes.append(info["is_success"])
    return {
        "success_rate": float(np.mean(successes)),
        "mean_steps": float(np.mean(lengths)),
        "max_steps": int(np.max(lengths)),
    }


def steps_per_second(tier: str, num_steps: int) -> dict[str, float]:
    """Rendered steps per second on one core, resets included, with random actions and with the expert's (its planning
    included). The best of three rounds: other programs only ever make it slower."""
    result = {}
    for name in ("random", "expert"):
        env, rng = TabletopEnv(tier), np.random.default_rng(0)
        rounds = []
        for _ in range(3):
            env.reset(seed=0)
            start = time.perf_counter()
            for _ in range(num_steps):
                _, _, terminated, truncated, _ = env.step(POLICIES[name][1](env, rng))
                if terminated or truncated:
                    env.reset()
            rounds.append(num_steps / (time.perf_counter() - start))
        result[name] = max(rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--start_seed", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for tier in TIERS:
        results[tier] = {"steps_per_second": steps_per_second(tier, args.steps)}
        for name in POLICIES:
            results[tier][name] = evaluate(tier, name, args.episodes, args.start_seed)
    print(json.dumps(results, indent=2))
    write_result({"machine": describe_machine(), "episodes": args.episodes, "results": results}, args.output)


if __name__ == "__main__":
    main()
