"""Trains and measures a LAQ on frame tuples.

    <output_dir>/config.json, model.safetensors      the LAQ, when training is done
    <output_dir>/metrics.json                        its final figures
    <output_dir>/run/                                settings, metrics.jsonl, checkpoints of the run

A run that was stopped or killed continues from its newest checkpoint, random numbers included; its batches depend on
seed, step and process alone. Under `accelerate launch` every process has batches of its own, and one of them writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
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
from hlrp_core.laq.pairs import FrameTuples
from hlrp_core.laq.probes import (
    MIN_PAIRS_TO_JUDGE,
    CodebookUse,
    CollapseWatch,
    action_probe_r2,
    check_no_collapse,
    has_motion_to_tell,
    measure_codebook_use,
    psnr_gain_db,
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

logger = logging.getLogger(__name__)

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
    _expect_some("training", num_train)
    _expect_some("held-out", num_held_out)
    if laq.quantizer == "fsq" and laq.num_frames == 2:
        why = "with laq.quantizer=fsq, which goes by the spread of what it sees at once"
        more = "Use longer or more episodes, or a smaller laq.frame_gap."
        expect(num_train > 1, "training pairs", f"2 or more {why}", num_train, more)
        expect(config.batch_size > 1, "batch_size", f"2 or more {why}", config.batch_size, "Use 2 or a larger number.")


def _expect_some(which: str, num_pairs: int) -> None:
    expect(num_pairs > 0, f"{which} pairs", "1 or more", num_pairs, "Use longer episodes, or a smaller laq.frame_gap.")


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
    laq.calibrate(_calibration_batches(train, accelerator.device))
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
            record = {"step": self.step, "loss": mean_loss, **figures, **_perplexity_figures(use)}
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


# -- measuring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_reconstruction(laq: LatentActionQuantizer, batches: Iterable[Tensor]) -> dict[str, float]:
    """Mean squared errors of the reconstruction and of the copy of frame t, and the gain between them in dB.

    Raises:
        ValueError: there are no batches.
    """
    laq.eval()
    device = next(laq.parameters()).device
    error, copy_error, count = 0.0, 0.0, 0
    for frames in batches:
        output = laq(frames.to(device))
        error += (output.reconstruction - output.target).square().mean().item() * len(frames)
        copy_error += (output.source - output.target).square().mean().item() * len(frames)
        count += len(frames)
    _expect_some("held-out", count)
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
        ValueError: there are no held-out tuples.
    """
    _expect_some("held-out", len(held_out))
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
        motion = torch.from_numpy(held_out.motion)
        if has_motion_to_tell(motion[_is_known(motion)]):
            figures |= run_action_probes(laq, train.spread(max_probe_pairs), held_out, held_out_codes=codes)
        else:
            logger.warning("No action probe: the %d held-out pairs have the same motion.", len(held_out))
    return figures


def _perplexity_figures(use: CodebookUse) -> dict[str, Any]:
    return {"perplexity": use.perplexity, "perplexity_by_position": use.perplexities.tolist()}


def _use_figures(use: CodebookUse) -> dict[str, Any]:
    return _perplexity_figures(use) | {"used_share": use.used_share, "code_counts": use.counts.tolist()}


def run_action_probes(
    laq: LatentActionQuantizer, train: FrameTuples, held_out: FrameTuples, *, held_out_codes: Tensor
) -> dict[str, float]:
    """R² of the probe on the LAQ's codes, on those of a random-weight LAQ, and on shuffled ones."""
    assert train.motion is not None and held_out.motion is not None
    motion, test_motion = torch.from_numpy(train.motion), torch.from_numpy(held_out.motion)
    size = laq.codebook_size

    known, test_known = _is_known(motion), _is_known(test_motion)

    def probe(train_codes: Tensor, test_codes: Tensor) -> float:
        return action_probe_r2(
            train_codes[known], motion[known], test_codes[test_known], test_motion[test_known], codebook_size=size
        )

    codes = encode_all(laq, train)
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    random_laq = make_random_laq(laq.config, train).to(next(laq.parameters()).device)
    return {
        "action_probe_r2": probe(codes, held_out_codes),
        "action_probe_r2_random": probe(encode_all(random_laq, train), encode_all(random_laq, held_out)),
        "action_probe_r2_shuffled": probe(codes[order], held_out_codes),
    }


def _is_known(motion: Tensor) -> Tensor:
    """`[N]` bool of motions `[N, A]`."""
    return motion.isfinite().all(1)


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
