"""The report's pictures: loss, code accuracy and success over the training steps, and rollouts as film strips."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lerobot_hlrp.demo.runner import CONTINUED

INK, GRID = "#22303c", "#d9dee3"
COLOURS = {"codes": "#2f6db5", "actions": "#c8553d", "baseline": "#8a949e", "success": "#2e8b57"}

# `step:1K smpl:32K ... loss:0.612 grdn:0.5 lr:1.0e-03 ... code_accuracy:0.31`, as lerobot-train logs it
_LOGGED = re.compile(r"([A-Za-z_/]+):([-+0-9.eE]+)([KMB]?)")
_SCALE = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}
_CONTINUED = re.compile(f"^{CONTINUED} from step ([0-9]+)$")
_SUCCESS = re.compile(r"Suite overall aggregated:.*?'pc_success': ([0-9.]+)")


def read_training_log(text: str, *, log_freq: int) -> dict[str, list[float]]:
    """Curves from what `lerobot-train` prints.

    Args:
        text: its output, progress bars and all, with a `CONTINUED` line wherever it went on from a checkpoint.
        log_freq: steps between two lines; their printed step is rounded, so steps are counted instead.

    Returns:
        Series by name; `step` is among them.
    """

    def read_line(line: str) -> dict[str, float]:
        if "loss:" not in line or "grdn:" not in line:
            return {}
        return {name: float(value) * _SCALE[unit] for name, value, unit in _LOGGED.findall(line.split("] ")[-1])}

    rows = _read_rows(text, read_line, every=log_freq)
    names = [name for name in (rows[0] if rows else {}) if all(name in row for row in rows)]
    return {"step": []} | {name: [row[name] for row in rows] for name in names}


def read_success_log(text: str, *, eval_freq: int) -> dict[str, list[float]]:
    """Success shares that `lerobot-train` measured while training: `step` and `success`. Arguments as above."""

    def read_line(line: str) -> dict[str, float]:
        found = _SUCCESS.search(line)
        return {"success": float(found[1]) / 100} if found else {}

    rows = _read_rows(text, read_line, every=eval_freq)
    return {name: [row[name] for row in rows] for name in ("step", "success")}


def _read_rows(text: str, read_line: Callable[[str], dict[str, float]], *, every: int) -> list[dict[str, float]]:
    """What a training printed at each multiple of `every` steps, once each: where it went on from a checkpoint, the
    continuation counts and not what came after that checkpoint before."""
    rows: list[dict[str, float]] = []
    step = 0
    for line in re.split(r"[\r\n]", text):
        if continued := _CONTINUED.match(line):
            step = int(continued[1])
            rows = [row for row in rows if row["step"] <= step]
        elif values := read_line(line):
            step = (step // every + 1) * every
            rows.append({**values, "step": step})
    return rows


def _axes(width: float = 5.2, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_codes_training(trainings: list[dict[str, list[float]]], path: Path) -> Path:
    """Stage 2: loss, and code accuracy beside the constant prediction, of one training after the other."""
    figure, (left, right) = _axes(columns=2)
    start = 0.0
    for curves in trainings:
        steps = [start + step for step in curves["step"]]
        left.plot(steps, curves["loss"], color=COLOURS["codes"], linewidth=2)
        right.plot(steps, curves["code_accuracy"], color=COLOURS["codes"], linewidth=2)
        right.plot(steps, curves["constant_accuracy"], color=COLOURS["baseline"], linewidth=2, ls="--")
        if start:
            for axis in (left, right):
                axis.axvline(start, color=COLOURS["baseline"], linewidth=1, ls=":")
        start = steps[-1]
    left.set(title="Stage 2: loss of the code tokens", xlabel="training step")
    right.set(title="Stage 2: code accuracy", xlabel="training step", ylim=(0, None))
    right.legend(right.get_lines()[:2], ["model", "best constant"], frameon=False, loc="lower right")
    return _save(figure, path)


def draw_actions_training(curves: dict[str, list[float]], success: dict[str, list[float]], path: Path) -> Path:
    """Stage 3: loss of the flow, and success measured while training."""
    figure, axes = _axes(columns=2 if success["step"] else 1)
    axes[0].plot(curves["step"], curves["loss"], color=COLOURS["actions"], linewidth=2)
    axes[0].set(title="Stage 3: flow-matching loss", xlabel="training step")
    if success["step"]:
        axes[1].plot(success["step"], success["success"], color=COLOURS["success"], linewidth=2, marker="o")
        axes[1].set(title="Stage 3: success while training", xlabel="training step", ylim=(0, 1.05))
    return _save(figure, path)


def draw_success(shares: dict[str, dict[str, float]], path: Path) -> Path:
    """Bars of success: `{tier: {policy: share}}`."""
    figure, (axis,) = _axes(width=7)
    names = list(dict.fromkeys(name for tier in shares.values() for name in tier))
    palette = [COLOURS["success"], "#e0a030", "#7d6bb0", COLOURS["baseline"]]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [i + (number - (len(names) - 1) / 2) * width for i in range(len(shares))]
        heights = [tier.get(name, np.nan) for tier in shares.values()]
        bars = axis.bar(at, heights, width * 0.9, color=palette[number % len(palette)], label=name)
        axis.bar_label(bars, [f"{100 * h:.0f}%" for h in heights], fontsize=9, color=INK)
    axis.set_xticks(range(len(shares)), list(shares))
    axis.grid(visible=False, axis="x")
    axis.set(title="Success over held-out episodes", ylim=(0, 1.08))
    columns = len(names) if len(names) <= 3 else 2  # four beside each other are wider than the picture
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=columns)
    return _save(figure, path)
