"""Trains a LAQ on frame tuples.

    <output_dir>/config.json, model.safetensors      the LAQ, when training is done
    <output_dir>/metrics.json                        its final figures
    <output_dir>/run/                                settings, metrics.jsonl, checkpoints of the run

A run that was stopped or killed continues from its newest checkpoint, random numbers included; its batches depend on
seed, step and process alone. Under `accelerate launch` every process has batches of its own, and one of them writes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from safetensors.torch import load_model
from torch import Tensor
from tqdm import tqdm

from hlrp_core.expectation import expect, expect_at_least
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.evaluation import (
    calibration_batches,
    evaluate_reconstruction,
    expect_some,
    measure_laq,
    perplexity_figures,
)
from hlrp_core.laq.pairs import FrameTuples
from hlrp_core.laq.probes import (
    MIN_PAIRS_TO_JUDGE,
    CodebookUse,
    CollapseWatch,
    measure_codebook_use,
)
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.run_folder import (
    RunFolder,
    StopRequest,
    capture_random_state,
    load_optimizer,
    load_random_state,
    read_json,
    restore_random_state,
    save_optimizer,
    save_random_state,
    write_json,
)

RUN = "run"
FINAL_METRICS = "metrics.json"

# They change what is shown or kept, not what is learned: a continued run may have others.
DISPLAY_SETTINGS = ("log_freq", "save_freq")


@dataclass
class LAQTrainingConfig:
    """Raises:
    ValueError: a setting is out of range.
    """

    # Optimizer steps.
    steps: int = 2000
    # Frame pairs in a batch, of each process.
    batch_size: int = 64
    # Peak learning rate; after the warmup it falls to 0 along a cosine.
    lr: float = 2e-3
    # Steps of linear warmup.
    warmup_steps: int = 50
    # Of AdamW.
    weight_decay: float = 1e-2
    # Gradients are scaled down to this norm.
    grad_clip_norm: float = 1.0
    # Share of the steps over which FSQ goes from unquantised to quantised.
    soft_share: float = 0.4
    # Of everything that is drawn at random.
    seed: int = 0
    # Steps between two lines of metrics.
    log_freq: int = 50
    # Steps between two checkpoints.
    save_freq: int = 500
    # Held-out pairs at most in an evaluation.
    max_eval_pairs: int = 2000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_freq", "save_freq", "max_eval_pairs"):
            expect_at_least(name, 1, getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "seed"):
            expect_at_least(name, 0, getattr(self, name))
        for name in ("lr", "grad_clip_norm"):
            expect(getattr(self, name) > 0, name, "above 0", getattr(self, name), "Raise it.")
        expect(0 <= self.soft_share <= 1, "soft_share", "a share from 0 to 1", self.soft_share, "Use 0.4.")

    def learning_rate(self, step: int) -> float:
        """Of the step after `step` steps."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def hardness(self, step: int) -> float:
        return min(1.0, step / max(self.soft_share * self.steps, 1))


def make_accelerator() -> Accelerator:
    """An accelerator whose processes wait for one another as long as it takes to decode a dataset.

    In float32, whatever accelerate's own settings say: codes are asked for in float32, too.
    """
    return Accelerator(mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])


def check_pairs(laq: LAQConfig, config: LAQTrainingConfig, *, num_train: int, num_held_out: int) -> None:
    """Whether there are enough pairs to train and to measure on: what can be said before any work is done.

    Raises:
        ValueError: there are none, or with FSQ, which goes by the spread of the latents, a single transition.
    """
    expect_some("training", num_train)
    expect_some("held-out", num_held_out)
    if laq.quantizer == "fsq" and laq.num_frames == 2:
        why = "with laq.quantizer=fsq, which goes by the spread of what it sees at once"
        more = "Use longer or more episodes, or a smaller laq.frame_gap."
        expect(num_train > 1, "training pairs", f"2 or more {why}", num_train, more)
        expect(config.batch_size > 1, "batch_size", f"2 or more {why}", config.batch_size, "Use 2 or a larger number.")


def train_laq(
    laq: LatentActionQuantizer,
    train: FrameTuples,
    held_out: FrameTuples,
    config: LAQTrainingConfig,
    *,
    output_dir: str | Path,
    settings: dict[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any] | None:
    """Train until `config.steps`, then measure and save; call it again with the same arguments to continue.

    Args:
        laq: trained in place.
        train, held_out: for all processes the same.
        settings: further JSON that decides the result, such as the dataset's name; equal in a continued run.
        accelerator: by default a new one.

    Returns:
        the final figures, or None where the run was interrupted.

    Raises:
        CodebookCollapseError: the codes of a position carry nothing.
        ValueError: too few pairs, a loss that is not finite, or the folder holds another run, or one of another number
            of processes.
    """
    check_pairs(laq.config, config, num_train=len(train), num_held_out=len(held_out))
    output_dir = Path(output_dir)
    own = {f.name: getattr(config, f.name) for f in fields(LAQTrainingConfig) if f.name not in DISPLAY_SETTINGS}
    kept = {"training": own, "laq": asdict(laq.config), **(settings or {})}
    run = RunFolder(output_dir / RUN, kept, keep=1)
    accelerator = accelerator or make_accelerator()
    if not _LAQTrainer(laq, train, held_out, config, run=run, accelerator=accelerator).train_to_the_end():
        return None
    # In every process, so that none waits for another and a collapse ends them all.
    laq.calibrate(calibration_batches(train, accelerator.device))
    figures = measure_laq(laq, train, held_out.spread(config.max_eval_pairs))
    if accelerator.is_main_process:
        laq.save_pretrained(output_dir)
        write_json(output_dir / FINAL_METRICS, figures)
    accelerator.wait_for_everyone()
    return figures


class _LAQTrainer:
    """One run. Arguments as in `train_laq`."""

    def __init__(
        self,
        laq: LatentActionQuantizer,
        train: FrameTuples,
        held_out: FrameTuples,
        config: LAQTrainingConfig,
        *,
        run: RunFolder,
        accelerator: Accelerator,
    ):
        self.laq, self.train, self.held_out = laq, train, held_out
        self.config, self.run, self.accelerator = config, run, accelerator
        self.watch = CollapseWatch()
        self.step = 0
        set_seed(config.seed, device_specific=True)
        if accelerator.num_processes > 1:
            laq.quantizer.sync_across_processes()
        optimizer = torch.optim.AdamW(laq.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        random_state = self._continue(optimizer)
        self.model, self.optimizer = accelerator.prepare(laq, optimizer)
        if random_state is not None:
            restore_random_state(random_state)

    def train_to_the_end(self) -> bool:
        """False where the run was interrupted."""
        config, is_main = self.config, self.accelerator.is_main_process
        progress = tqdm(total=config.steps, initial=self.step, unit="step", desc="LAQ", disable=not is_main)
        self.model.train()
        with StopRequest() as stop, progress:
            while self.step < config.steps:
                loss = self._update()
                self.step += 1
                progress.update()
                if self.step % config.log_freq == 0 or self.step == config.steps:
                    record = self._log(loss)
                    gain, perplexity = record["reconstruction_gain_db"], record["perplexity"]
                    progress.set_postfix(
                        loss=f"{record['loss']:.4f}", gain=f"{gain:.2f}dB", perplexity=f"{perplexity:.2f}"
                    )
                is_stopping = self._agree(stop.requested)
                if is_stopping or self.step % config.save_freq == 0 or self.step == config.steps:
                    self._save()
                if is_stopping and self.step < config.steps:
                    if is_main:
                        print(
                            f"Stopped after step {self.step} of {config.steps}. Run the same command again to continue."
                        )
                    return False
        return True

    def _update(self) -> Tensor:
        """One optimizer step; its loss."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step)
        frames = self.train.sample(
            config.batch_size, seed=config.seed, step=self.step, rank=accelerator.process_index
        ).to(accelerator.device)
        output = self.model(frames, hardness=config.hardness(self.step))
        if not bool(torch.isfinite(output.loss)):
            raise ValueError(
                f"loss at step {self.step + 1}: expected a finite number, got {output.loss.item()}. "
                f"Next step: lower lr; the newest checkpoint is in {self.run.folder}."
            )
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return output.loss.detach()

    def _log(self, loss: Tensor) -> dict[str, Any]:
        """Measure and note it; the record, in every process.

        Raises:
            CodebookCollapseError: the codes are quantised in full and stay collapsed.
        """
        found: list[Any] = [None]
        mean_loss = self.accelerator.reduce(loss, reduction="mean").item()  # type: ignore[union-attr]
        if self.accelerator.is_main_process:
            figures = evaluate_reconstruction(self.laq, self.held_out.spread(256).batches(64))
            use, num_pairs = self._measure_use()
            record = {"step": self.step, "loss": mean_loss, **figures, **perplexity_figures(use)}
            self.run.log(record)
            found = [(record, use, num_pairs)]
        record, use, num_pairs = broadcast_object_list(found)[0]
        self.model.train()
        if self.config.hardness(self.step) == 1 and num_pairs >= MIN_PAIRS_TO_JUDGE:
            self.watch.look(use, self.laq.codebook_size)
        return record

    def _measure_use(self) -> tuple[CodebookUse, int]:
        """Use of the codebook by held-out pairs, or with few of those by training pairs, and how many they are."""
        pairs = (self.held_out if len(self.held_out) >= MIN_PAIRS_TO_JUDGE else self.train).spread(256)
        codes = self.laq.encode_uncalibrated(frames.to(self.accelerator.device) for frames in pairs.batches(64))
        return measure_codebook_use(codes.cpu(), self.laq.codebook_size), len(pairs)

    def _agree(self, is_stopping: bool) -> bool:
        """Whether any process was interrupted: all of them must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return is_stopping
        flag = torch.tensor(float(is_stopping), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)  # type: ignore[operator]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        random_states = gather_object([capture_random_state()])
        if self.accelerator.is_main_process:
            with self.run.new_checkpoint(self.step) as folder:
                self.laq.save_pretrained(folder)
                save_optimizer(self.optimizer, folder)
                for rank, random_state in enumerate(random_states):
                    save_random_state(random_state, folder, name=f"random_{rank}")
                write_json(
                    folder / "progress.json", {"step": self.step, "num_processes": self.accelerator.num_processes}
                )
        self.accelerator.wait_for_everyone()

    def _continue(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint, if there is one; the state of the random generators at it."""
        checkpoint, is_main = self.run.latest_checkpoint(), self.accelerator.is_main_process
        if checkpoint is None:
            if is_main:
                self.run.forget_after(0)
            return None
        progress = read_json(checkpoint / "progress.json")
        if progress["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint}: expected {progress['num_processes']} process(es), with which the run was started, got "
                f"{self.accelerator.num_processes}. Next step: launch as many, or start a new run."
            )
        load_model(self.laq, checkpoint / "model.safetensors")
        load_optimizer(optimizer, checkpoint)
        self.step = progress["step"]
        if is_main:
            self.run.forget_after(self.step)
            print(f"Continuing after step {self.step}.")
        return load_random_state(checkpoint, name=f"random_{self.accelerator.process_index}")
