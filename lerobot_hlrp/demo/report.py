"""The demo's report: `report.md` with pictures for people, `results.json` with the same figures for programs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hlrp_core.run_folder import write_json
from hlrp_tabletop import TabletopEnv
from lerobot_hlrp.demo import figures
from lerobot_hlrp.demo.pipeline import LOG_FREQ, Pipeline
from lerobot_hlrp.demo.runner import Step, StepRunner

EVAL_SEED = 1000  # lerobot-eval's default; hlrp-record draws from seeds far above
LABELS = {
    "true": "this policy",
    "shuffled": "this policy, shuffled instructions",
    "without_words": "trained without words",
    "random": "random actions",
}


def random_success(tier: str, episodes: int) -> float:
    """Success share of uniformly random actions on the scenes that `lerobot-eval` shows."""
    env = TabletopEnv(tier)
    rng = np.random.default_rng(0)
    successes = 0
    for episode in range(episodes):
        env.reset(seed=EVAL_SEED + episode)
        done = False
        while not done:
            *_, terminated, truncated, info = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
            done = terminated or truncated
        successes += info["is_success"]
    return successes / episodes


def collect_results(pipeline: Pipeline, runner: StepRunner, steps: list[Step]) -> dict[str, Any]:
    """All figures of the report."""
    laq = json.loads((pipeline.laq / "metrics.json").read_text())
    codes = json.loads(pipeline.codes_figures.read_text())
    evaluations = pipeline.evaluations + pipeline.evaluations_without_words
    by_name = {evaluation.name: pipeline.success(evaluation) for evaluation in evaluations}
    episodes = pipeline.preset.eval_episodes
    tiers: dict[str, dict[str, float]] = {}
    for tier in pipeline.preset.tiers:
        prefix = f"{tier}_"
        tiers[tier] = {name.removeprefix(prefix): share for name, share in by_name.items() if name.startswith(prefix)}
        tiers[tier]["random"] = random_success(tier, episodes)
    main = tiers[pipeline.preset.tiers[0]]
    laq_names = ("reconstruction_gain_db", "perplexity")
    probes = ("action_probe_r2", "action_probe_r2_random", "action_probe_r2_shuffled")
    return {
        "laq": {name: laq[name] for name in (*laq_names, *probes)},
        "stage2": {name: codes[name] for name in ("code_accuracy", "constant_accuracy")},
        "eval": {
            "success": main["true"],
            "success_shuffled_instructions": main["shuffled"],
            "episodes": episodes,
            "tiers": tiers,
        },
        "wall_s": runner.total_s(steps),
        "steps_s": {step.name: runner.wall_s(step) for step in steps},
    }


def draw_figures(pipeline: Pipeline, runner: StepRunner, steps: list[Step], results: dict[str, Any]) -> dict[str, Path]:
    """Every picture of the report, by name."""
    folder = pipeline.folder / "pictures"
    by_name = {step.name: step for step in steps}
    preset = pipeline.preset

    def log(name: str) -> str:
        return runner.log_path(by_name[name]).read_text(errors="replace")

    pictures = {}
    for name in ("reconstructions", "code_usage", "action_probe"):
        source = pipeline.laq / f"{name}.png"
        if source.is_file():
            folder.mkdir(exist_ok=True)
            pictures[name] = Path(shutil.copy(source, folder / source.name))
    trainings = [figures.read_training_log(log(step.name), log_freq=LOG_FREQ) for step in pipeline.stage2_steps()]
    if all(curves["step"] for curves in trainings):
        pictures["stage2"] = figures.draw_codes_training(trainings, folder / "stage2.png")
    curves = figures.read_training_log(log("stage3"), log_freq=LOG_FREQ)
    if curves["step"]:
        success = figures.read_success_log(log("stage3"), eval_freq=preset.actions.eval_freq)
        pictures["stage3"] = figures.draw_actions_training(curves, success, folder / "stage3.png")
    shares = {
        tier: {LABELS[name]: share for name, share in policies.items()}
        for tier, policies in results["eval"]["tiers"].items()
    }
    pictures["success"] = figures.draw_success(shares, folder / "success.png")
    return pictures


def copy_video(pipeline: Pipeline) -> Path | None:
    """The first rollout that `lerobot-eval` filmed, beside the report."""
    videos = sorted(pipeline.evaluation_folder(pipeline.evaluations[0]).rglob("*.mp4"))
    return Path(shutil.copy(videos[0], pipeline.folder / "rollout.mp4")) if videos else None


def write_report(pipeline: Pipeline, runner: StepRunner, steps: list[Step]) -> Path:
    """Write `results.json`, the pictures and `report.md`; returns the report's path."""
    results = collect_results(pipeline, runner, steps)
    pictures = draw_figures(pipeline, runner, steps, results)
    video = copy_video(pipeline)
    write_json(pipeline.folder / "results.json", results)
    path = pipeline.folder / "report.md"
    path.write_text(_report_text(pipeline, steps, results, pictures, video), encoding="utf-8")
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _report_text(
    pipeline: Pipeline, steps: list[Step], results: dict[str, Any], pictures: dict[str, Path], video: Path | None
) -> str:
    preset, laq, codes, evaluated = pipeline.preset, results["laq"], results["stage2"], results["eval"]
    recorded = " and ".join(f"{preset.episodes:,} scripted episodes of {tier}" for tier in preset.tiers)
    if preset.first_codes is not None:
        recorded += f", and {preset.first_episodes:,} more of {preset.tiers[0]} to begin with"

    def picture(name: str, text: str) -> list[str]:
        return [f"![{text}]({pictures[name].relative_to(pipeline.folder)})", ""] if name in pictures else []

    lines = [
        "# From video to a policy: what the demo did",
        "",
        f"The data are {recorded}. A latent-action quantiser learnt from their frames alone, a vision-language model "
        "learnt its codes from one frame and the instruction, and a flow-matching expert on top of it learnt actions. "
        f"All steps together took {results['wall_s'] / 60:.1f} minutes.",
        "",
        "## Success on scenes never recorded",
        "",
        f"{evaluated['episodes']} episodes a row. *Shuffled*: the words name another object of the same scene, success "
        "is judged by the original task; a policy that listens fails then.",
        "",
        "| tier | policy | success |",
        "|---|---|---|",
        *(
            f"| {tier} | {LABELS[name]} | {_percent(share)} |"
            for tier, policies in evaluated["tiers"].items()
            for name, share in policies.items()
        ),
        "",
        *picture("success", "success by tier and policy"),
        *([f"A rollout: [{video.name}]({video.name})", ""] if video else []),
        "## Stage 1: latent actions",
        "",
        f"The quantiser turns frames t and t+{preset.frame_gap} into {preset.code_seq_len} codes of "
        f"{preset.codebook_size}. Decoded from frame t and the codes, frame t+{preset.frame_gap} is "
        f"{laq['reconstruction_gain_db']:.1f} dB closer to the truth than a copy of frame t. "
        f"Perplexity of the codes: {laq['perplexity']:.1f} of {preset.codebook_size}.",
        "",
        *picture("reconstructions", "frame t, frame t+gap and its reconstruction"),
        *picture("code_usage", "how often each code is used"),
        "How well a linear map from the codes predicts the robot's motion, on held-out episodes (R²; 1 is perfect). "
        "The quantiser never saw an action.",
        "",
        "| codes of | R² |",
        "|---|---|",
        f"| the trained quantiser | {laq['action_probe_r2']:.2f} |",
        f"| one with random weights | {laq['action_probe_r2_random']:.2f} |",
        f"| the trained one, shuffled | {laq['action_probe_r2_shuffled']:.2f} |",
        "",
        *picture("action_probe", "action probe beside its controls"),
        "## Stage 2: codes from one frame and the instruction",
        "",
        f"On held-out episodes {_percent(codes['code_accuracy'])} of the codes are right; the best constant prediction "
        f"gets {_percent(codes['constant_accuracy'])}.",
        "",
        *_first_tier_lines(pipeline),
        *picture("stage2", "loss and code accuracy while training"),
        "## Stage 3: actions",
        "",
        *picture("stage3", "loss and success while training"),
        "## The commands",
        "",
        f"Each step is a command of its own.{_beside(results)}",
        "",
        "```bash",
        *(line for step in steps for line in (f"# {step.title}: {_minutes(results, step)}", shlex.join(step.command))),
        "```",
        "",
    ]
    return "\n".join(lines)


def _first_tier_lines(pipeline: Pipeline) -> list[str]:
    preset = pipeline.preset
    if preset.first_codes is None:
        return []
    return [
        f"It first learnt from {preset.tiers[0]} alone, as the quantiser did ({preset.first_codes.steps:,} steps), "
        f"then from all tiers ({preset.codes.steps:,} steps; dotted line).",
        "",
    ]


def _beside(results: dict[str, Any]) -> str:
    one_by_one = sum(results["steps_s"].values())
    if one_by_one < 1.05 * results["wall_s"]:
        return ""
    return f" Those without words ran beside the others; the times add up to {one_by_one / 60:.1f} minutes."


def _minutes(results: dict[str, Any], step: Step) -> str:
    return f"{results['steps_s'][step.name]:.0f} s"
