"""How much the demo does: sizes and budgets, and nothing else.

`demo` fits into 25 minutes on two CPU cores, `full` into 90; `smoke` only shows that every step runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Training:
    """Budget of one training run.

    Args:
        eval_freq: steps between evaluations in the tabletop; 0: none.
        beta2: AdamW's. What the words point at is learnt all at once, after a long plateau; the noisier the steps on
            it, the later.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int
    save_freq: int
    eval_freq: int = 0
    beta2: float = 0.99


@dataclass(frozen=True)
class Preset:
    """Args:
    tiers: tabletop tiers that are recorded, learned and evaluated.
    episodes: recorded in each tier.
    frame_gap: Δ in frames.
    codebook_size, code_seq_len: K and S.
    laq_steps, laq_batch_size, laq_num_layers: of the quantiser and its training.
    codes, actions: budgets of stage 2 and stage 3.
    first_codes: budget of stage 2 on the first tier alone, before `codes`; None: all tiers from the start. What the
        words point at is found in the simplest motions, and kept in the others. The quantiser is trained on these, too:
        where objects move, they get into the codes, which are then harder to predict.
    first_episodes: of the first tier, recorded for that.
    chunk_size, n_action_steps: actions predicted, and run, at once.
    noise: on the recorded expert's executed actions, so that the data show how to recover from errors.
    eval_episodes: held-out episodes for each tier.
    without_words: also train and evaluate the same policy on the same data without its instructions.
    """

    tiers: tuple[str, ...]
    episodes: int
    frame_gap: int
    laq_steps: int
    codes: Training
    actions: Training
    eval_episodes: int
    first_codes: Training | None = None
    first_episodes: int = 0
    codebook_size: int = 8
    code_seq_len: int = 4
    chunk_size: int = 8
    n_action_steps: int = 4
    without_words: bool = False
    noise: float = 0.1
    laq_batch_size: int = 32
    laq_num_layers: int = 3
    eval_curve_episodes: int = 20
    num_workers: int = 1
    holdout_share: float = 0.05
    head: dict[str, int] = field(
        default_factory=lambda: {"hidden_dim": 128, "num_layers": 3, "num_heads": 4, "num_noise_draws": 2}
    )


PRESETS = {
    "smoke": Preset(
        tiers=("reach",),
        episodes=24,
        frame_gap=2,
        laq_steps=60,
        codes=Training(steps=6, batch_size=8, lr=1e-3, warmup=2, save_freq=3),
        actions=Training(steps=6, batch_size=8, lr=7e-4, warmup=2, save_freq=3),
        eval_episodes=2,
    ),
    "demo": Preset(
        tiers=("reach",),
        episodes=8000,
        frame_gap=3,
        laq_steps=800,
        codes=Training(steps=2000, batch_size=64, lr=1e-3, warmup=100, save_freq=400),
        actions=Training(steps=200, batch_size=64, lr=1e-3, warmup=50, save_freq=100, eval_freq=100),
        eval_episodes=50,
    ),
    "full": Preset(
        tiers=("reach", "push"),
        episodes=6000,
        frame_gap=3,
        laq_steps=800,
        first_episodes=8000,
        first_codes=Training(steps=2000, batch_size=64, lr=1e-3, warmup=100, save_freq=500),
        codes=Training(steps=6000, batch_size=64, lr=1e-3, warmup=100, save_freq=1000),
        actions=Training(steps=800, batch_size=64, lr=1e-3, warmup=50, save_freq=200, eval_freq=200),
        eval_episodes=50,
        without_words=True,
    ),
}
