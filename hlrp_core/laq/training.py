"""Trains and measures a LAQ on frame tuples.

    <output_dir>/config.json, model.safetensors      the LAQ, when training is done
    <output_dir>/metrics.json                        its final figures
    <output_dir>/run/                                settings, metrics.jsonl, checkpoints of the run

A run that was stopped or killed continues from its newest checkpoint; its batches depend on seed and step alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_model
from torch import Tensor
from tqdm import tqdm

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.pairs import FrameTuples
from hlrp_core.laq.probes import (
    MIN_PAIRS_TO_JUDGE,
    CodebookUse,
    action_probe_r2,
    check_no_collapse,
    has_motion_to_tell,
    measure_codebook_use,
    psnr_gain_db,
)
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.run_folder import RunFolder, StopRequest, load_optimizer, read_json, save_optimizer, write_json

logger = logging.getLogger(__name__)

RUN = "run"
FINAL_METRICS = "metrics.json"

# They change what is shown or kept, not what is learned: a continued run may have others.
DISPLAY_SETTINGS = ("log_freq", "save_freq")


@dataclass
class LAQTrainingConfig:
    # Optimizer steps.
    steps: int = 2000
    # Frame pairs in a batch.
    batch_size: int = 64
    # Peak learning rate; after the warmup it falls to 0 along a cosine.
    lr: float = 2e-3
    # Steps of linear warmup.
    warmup_steps: int = 50
    weight_decay: float = 1e-2
    grad_clip_norm: float = 1.0
    # Share of the steps over which FSQ goes from unquantised to quantised.
    soft_share: float = 0.4
    seed: int = 0
    # Steps between two lines of metrics.
    log_freq: int = 50
    # Steps between two checkpoints.
    save_freq: int = 500
    # Held-out pairs at most in an evaluation.
    max_eval_pairs: int = 2000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_freq", "save_freq", "max_eval_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    def learning_rate(self, step: int) -> float:
        """Of the step after `step` steps."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def hardness(self, step: int) -> float:
        return min(1.0, step / max(self.soft_share * self.steps, 1))


def train_laq(
    laq: LatentActionQuantizer,
    train: FrameTuples,
    held_out: FrameTuples,
    config: LAQTrainingConfig,
    *,
    output_dir: str | Path,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train until `config.steps`, then measure and save; call it again with the same arguments to continue.

    Args:
        laq: trained in place.
        settings: further JSON that decides the result, such as the dataset's name; equal in a continued run.

    Returns:
        the final figures, or None where the run was interrupted.

    Raises:
        CodebookCollapseError: the codes carry nothing.
        ValueError: the folder holds another run.
    """
    output_dir = Path(output_dir)
    own = {f.name: getattr(config, f.name) for f in fields(LAQTrainingConfig) if f.name not in DISPLAY_SETTINGS}
    kept = {"training": own, "laq": asdict(laq.config), **(settings or {})}
    run = RunFolder(output_dir / RUN, kept, keep=1)
    accelerator = Accelerator()
    set_seed(config.seed)
    optimizer = torch.optim.AdamW(laq.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step = _continue(run, laq, optimizer)
    model, optimizer = accelerator.prepare(laq, optimizer)
    model.train()
    with StopRequest() as stop, tqdm(total=config.steps, initial=step, unit="step", desc="LAQ") as progress:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            frames = train.sample(config.batch_size, seed=config.seed, step=step).to(accelerator.device)
            output = model(frames, hardness=config.hardness(step))
            accelerator.backward(output.loss)
            accelerator.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update()
            if step % config.log_freq == 0 or step == config.steps:
                figures = evaluate_reconstruction(laq, held_out.spread(256).batches(64))
                model.train()
                gain = figures["reconstruction_gain_db"]
                progress.set_postfix(loss=f"{output.loss.item():.4f}", gain=f"{gain:.2f}dB")
                run.log({"step": step, "loss": output.loss.item(), **figures})
            if stop.requested or step % config.save_freq == 0 or step == config.steps:
                with run.new_checkpoint(step) as folder:
                    laq.save_pretrained(folder)
                    save_optimizer(optimizer, folder)
                    write_json(folder / "progress.json", {"step": step})
            if stop.requested and step < config.steps:
                print(f"Stopped after step {step} of {config.steps}. Run the same command again to continue.")
                return None
    laq.calibrate(_calibration_batches(train, accelerator.device))
    figures = measure_laq(laq, train, held_out.spread(config.max_eval_pairs))
    laq.save_pretrained(output_dir)
    write_json(output_dir / FINAL_METRICS, figures)
    return figures


def _continue(run: RunFolder, laq: LatentActionQuantizer, optimizer: torch.optim.Optimizer) -> int:
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.forget_after(0)
        return 0
    load_model(laq, checkpoint / "model.safetensors")
    load_optimizer(optimizer, checkpoint)
    step = read_json(checkpoint / "progress.json")["step"]
    run.forget_after(step)
    print(f"Continuing after step {step}.")
    return step


# -- measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_reconstruction(laq: LatentActionQuantizer, batches: Iterable[Tensor]) -> dict[str, float]:
    """Mean squared errors of the reconstruction and of the copy of frame t, and the gain between them in dB."""
    laq.eval()
    device = next(laq.parameters()).device
    error, copy_error, count = 0.0, 0.0, 0
    for frames in batches:
        output = laq(frames.to(device))
        error += (output.reconstruction - output.target).square().mean().item() * len(frames)
        copy_error += (output.source - output.target).square().mean().item() * len(frames)
        count += len(frames)
    return {
        "mse": error / count,
        "copy_mse": copy_error / count,
        "reconstruction_gain_db": psnr_gain_db(error / count, copy_error / count),
    }


def encode_all(laq: LatentActionQuantizer, tuples: FrameTuples, batch_size: int = 256) -> Tensor:
    """Codes `[M, S]` of all tuples, on the CPU."""
    device = next(laq.parameters()).device
    return torch.cat([laq.encode(frames.to(device)).cpu() for frames in tuples.batches(batch_size)])


def measure_laq(
    laq: LatentActionQuantizer, train: FrameTuples, held_out: FrameTuples, *, max_probe_pairs: int = 10_000
) -> dict[str, Any]:
    """The figures of a trained LAQ on held-out tuples: reconstruction, use of the codebook, action probe and controls.

    With few held-out tuples the use of the codebook is that of training tuples (`codebook_use_from`), and where none of
    the held-out motions differs from another there is no action probe.

    Raises:
        CodebookCollapseError: the codes carry nothing.
    """
    codes = encode_all(laq, held_out)
    use_from, codes_in_use = "held-out", codes
    if len(held_out) < MIN_PAIRS_TO_JUDGE:
        logger.warning("Only %d held-out pairs: the use of the codebook is that of training pairs.", len(held_out))
        use_from, codes_in_use = "training", encode_all(laq, train.spread(2000))
    use = measure_codebook_use(codes_in_use, laq.codebook_size)
    check_no_collapse(use, laq.codebook_size)
    figures: dict[str, Any] = evaluate_reconstruction(laq, held_out.batches(256)) | _use_figures(use)
    figures["codebook_use_from"] = use_from
    if train.motion is not None and held_out.motion is not None:
        if has_motion_to_tell(torch.from_numpy(held_out.motion)):
            figures |= run_action_probes(laq, train.spread(max_probe_pairs), held_out, held_out_codes=codes)
        else:
            logger.warning("No action probe: the %d held-out pairs have the same motion.", len(held_out))
    return figures


def _use_figures(use: CodebookUse) -> dict[str, Any]:
    return {"perplexity": use.perplexity, "used_share": use.used_share, "code_counts": use.counts.tolist()}


def run_action_probes(
    laq: LatentActionQuantizer, train: FrameTuples, held_out: FrameTuples, *, held_out_codes: Tensor
) -> dict[str, float]:
    """R² of the probe on the LAQ's codes, on those of a random-weight LAQ, and on shuffled ones."""
    assert train.motion is not None and held_out.motion is not None
    motion, test_motion = torch.from_numpy(train.motion), torch.from_numpy(held_out.motion)
    size = laq.codebook_size

    def probe(train_codes: Tensor, test_codes: Tensor) -> float:
        return action_probe_r2(train_codes, motion, test_codes, test_motion, codebook_size=size)

    codes = encode_all(laq, train)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    random_laq = make_random_laq(laq.config, train).to(next(laq.parameters()).device)
    return {
        "action_probe_r2": probe(codes, held_out_codes),
        "action_probe_r2_random": probe(encode_all(random_laq, train), encode_all(random_laq, held_out)),
        "action_probe_r2_shuffled": probe(codes[order], held_out_codes),
    }


def make_random_laq(config: LAQConfig, tuples: FrameTuples, *, seed: int = 1) -> LatentActionQuantizer:
    """A LAQ that learnt nothing but the mean and spread of its own latents: the control with a fair codebook.

    Without that, random weights put all pairs into one code, and the control would be too easy to beat.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        laq = LatentActionQuantizer(config)
    laq.calibrate(_calibration_batches(tuples, torch.device("cpu")))
    return laq.eval()


def _calibration_batches(tuples: FrameTuples, device: torch.device) -> Iterator[Tensor]:
    return (frames.to(device) for frames in tuples.spread(4096).batches(256))
