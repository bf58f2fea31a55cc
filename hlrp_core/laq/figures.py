"""Pictures of a trained LAQ: reconstructions beside the frames, use of the codes, and the action probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's own: a notebook's, say

from hlrp_core.laq.pairs import FrameTuples
from hlrp_core.laq.quantizer import LatentActionQuantizer

BLUE, GREY, GRID = "#2f6db5", "#8a949e", "#d9dee3"


def draw_all(laq: LatentActionQuantizer, held_out: FrameTuples, figures: dict[str, Any], *, folder: Path) -> list[Path]:
    """Draw every picture that the figures allow, into `folder`."""
    paths = [draw_code_usage(figures["code_counts"], folder / "code_usage.png")]
    if laq.config.target == "pixels":
        paths.append(draw_reconstructions(laq, held_out, folder / "reconstructions.png"))
    if "action_probe_r2" in figures:
        paths.append(draw_action_probe(figures, folder / "action_probe.png"))
    return paths


@torch.no_grad()
def draw_reconstructions(laq: LatentActionQuantizer, tuples: FrameTuples, path: Path, *, rows: int = 6) -> Path:
    """Frame t, frame t+Δ, its reconstruction, and the two changes, for pairs spread over the held-out ones."""
    laq.eval()
    frames = next(iter(tuples.spread(rows).batches(rows)))
    output = laq(frames.to(next(laq.parameters()).device))
    images = [x[:: laq.config.num_frames - 1].cpu() for x in (output.source, output.target, output.reconstruction)]
    source, target, reconstruction = images

    def change(later: torch.Tensor) -> torch.Tensor:
        return (0.5 + (later - source)).clamp(0, 1)

    columns = [
        ("frame t", source),
        (f"frame t+{laq.frame_gap}", target),
        ("from frame t and the codes", reconstruction.clamp(0, 1)),
        ("true change", change(target)),
        ("decoded change", change(reconstruction)),
    ]
    figure = Figure(figsize=(1.7 * len(columns), 1.7 * len(frames)), layout="constrained")
    axes = figure.subplots(len(frames), len(columns), squeeze=False)
    for column, (title, shown) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=9)
        for row in range(len(frames)):
            axes[row, column].imshow(shown[row].permute(1, 2, 0).numpy())
            axes[row, column].set_axis_off()
    return _save(figure, path)


def draw_code_usage(counts: list[list[int]], path: Path) -> Path:
    """Share of each code, one panel a position."""
    shares = np.array(counts) / np.array(counts).sum(1, keepdims=True)
    num_positions, size = shares.shape
    figure = Figure(figsize=(2.2 * num_positions, 2.2), layout="constrained")
    axes = figure.subplots(1, num_positions, sharey=True, squeeze=False)
    for position, axis in enumerate(axes[0]):
        axis.bar(range(size), shares[position], color=BLUE)
        axis.axhline(1 / size, color=GREY, linewidth=1, ls="--")
        axis.set_title(f"position {position + 1}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("code", fontsize=8)
    axes[0, 0].set_ylabel("share (dashed: even use)", fontsize=8)
    return _save(figure, path)


def draw_action_probe(figures: dict[str, Any], path: Path) -> Path:
    """R² of the probe beside its two controls."""
    names = {
        "trained": figures["action_probe_r2"],
        "random weights": figures["action_probe_r2_random"],
        "shuffled codes": figures["action_probe_r2_shuffled"],
    }
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(list(names), list(names.values()), color=[BLUE, GREY, GREY], width=0.6)
    axis.bar_label(bars, [f"{value:.2f}" for value in names.values()], fontsize=9)
    axis.set_ylabel("R² on held-out episodes", fontsize=9)
    axis.set_ylim(min(0, *names.values()) * 1.1, max(0.1, *names.values()) * 1.12)  # room for the labels
    axis.grid(axis="y", color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
