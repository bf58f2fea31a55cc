"""Settings of a stage-2 training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hlrp_core.contract import BackendMode
from hlrp_core.expectation import expect, expect_choice

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # ours -> accelerate's

TRAINED_MODES = (BackendMode.CODES, BackendMode.MULTITASK)

# They change what is shown or kept, not what is learned: a continued run may have others.
DISPLAY_SETTINGS = ("log_freq", "eval_freq", "save_freq", "keep_checkpoints")


@dataclass
class CodeTrainingConfig:
    """How long, how fast, how often.

    Raises:
        ValueError: a setting is out of range.
    """

    # What is learned: `codes`, or `multitask`: codes, and actions where samples have them.
    mode: str = "codes"
    # Optimizer steps.
    steps: int = 10_000
    # Peak learning rate; after the warmup it falls to 0 along a cosine.
    lr: float = 1e-4
    # Steps of linear warmup.
    warmup_steps: int = 500
    # Of AdamW.
    weight_decay: float = 1e-4
    # Decay of its two moving averages.
    betas: tuple[float, float] = (0.9, 0.95)
    # Gradients are scaled down to this norm.
    grad_clip_norm: float = 1.0
    # Of everything that is drawn at random.
    seed: int = 0
    # Precision of the computation; below float32 it is mixed, and the weights stay as they are.
    dtype: str = "float32"
    # Steps between two lines of metrics.
    log_freq: int = 50
    # Steps between two evaluations on the held-out data; 0 for one at the end alone.
    eval_freq: int = 1000
    # Steps between two checkpoints; 0 for one at the end alone.
    save_freq: int = 1000
    # The newest checkpoints that are kept; 0 for all.
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "log_freq"):
            expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name), "raise it.")
        for name in ("warmup_steps", "eval_freq", "save_freq", "keep_checkpoints", "weight_decay"):
            expect(getattr(self, name) >= 0, name, "0 or more", getattr(self, name), "raise it.")
        for name in ("lr", "grad_clip_norm"):
            expect(getattr(self, name) > 0, name, "above 0", getattr(self, name), "raise it.")
        expect_choice("mode", self.mode, [mode.value for mode in TRAINED_MODES])
        expect_choice("dtype", self.dtype, PRECISIONS)


def learning_rate(config: CodeTrainingConfig, step: int) -> float:
    """Of the update after `step` finished ones. A function of the step alone, so that a resumed run needs no state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and at the last one, happens after `step`."""
    return step == last or (every > 0 and step % every == 0)
