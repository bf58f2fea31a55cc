"""The stage-2 loop: teach a backend to predict codes, from any iterable of FoundationBatch.

It runs on accelerate, so `accelerate launch` gives several devices and mixed precision; a run that was stopped or
killed continues from its newest checkpoint, weights, optimizer, random numbers and place in the data included.

    <output_dir>/settings.json, metrics.jsonl
    <output_dir>/checkpoints/000500/pretrained_model/    the backend's bundle, complete in itself
    <output_dir>/checkpoints/000500/training_state/      what only a continued run needs
    <output_dir>/checkpoints/last                        link to the newest
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch import nn
from tqdm import tqdm

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.bundle import WEIGHTS, load_tensors, save_pretrained
from hlrp_core.contract import BackendMode, FoundationBatch, LossOutput
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
from hlrp_core.training.config import DISPLAY_SETTINGS, PRECISIONS, CodeTrainingConfig, is_due, learning_rate
from hlrp_core.training.evaluation import CodeEvaluation, evaluate_codes, evaluate_sources
from hlrp_core.training.measures import Drawn, Window, shorten
from hlrp_core.training.mixing import MixedBatches, MixedStream, open_stream
from hlrp_core.training.objective import TrainingObjective
from hlrp_core.training.rows import merge_batches

if TYPE_CHECKING:
    from hlrp_core.training.batches import SeekableBatches, Stream

MODEL = "pretrained_model"
STATE = "training_state"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodeTrainingResult:
    """Args:
    folder: of the newest model, as `save_model` wrote it.
    step: how far the run has come.
    is_finished: False where it was interrupted.
    evaluation: the last one; None without held-out data or before the first.
    by_source: the same for each source that has held-out data of its own.
    drawn: samples that were trained on, whole passes, and with several sources the share, of each.
    """

    folder: Path
    step: int
    is_finished: bool
    evaluation: CodeEvaluation | None
    by_source: dict[str, CodeEvaluation]
    drawn: dict[str, dict[str, Any]]


def train_codes(
    backend: ComposedBackend,
    batches: Iterable[FoundationBatch] | SeekableBatches | MixedBatches,
    config: CodeTrainingConfig,
    *,
    output_dir: str | Path,
    eval_batches: Iterable[FoundationBatch] | Mapping[str, Iterable[FoundationBatch]] | None = None,
    settings: dict[str, Any] | None = None,
    save_model: Callable[[Path], Any] | None = None,
    accelerator: Accelerator | None = None,
) -> CodeTrainingResult:
    """Train until `config.steps`, or until an interrupt; call it again with the same arguments to continue.

    Args:
        backend: predicts codes; trained in place.
        batches: labelled ones, in this process's share of the data; read again from the start where they end. A
            `MixedBatches` draws from several sources.
        config: settings of the run.
        output_dir: the run's folder.
        eval_batches: labelled ones that are not trained on, for all processes the same; or by the name of the source,
            each evaluated by itself and all together.
        settings: further JSON that decides the result, such as the names of the data; equal in a continued run.
        save_model: writes the model into an existing, empty folder; by default as the core's bundle.
        accelerator: by default one of the config's precision.

    Raises:
        ValueError: the data have no codes, or the folder holds another run.
    """
    kept = {f.name: getattr(config, f.name) for f in fields(CodeTrainingConfig) if f.name not in DISPLAY_SETTINGS}
    run = RunFolder(
        output_dir,
        {"training": kept, "backend": asdict(backend.config), **(settings or {})},
        keep=config.keep_checkpoints,
    )
    trainer = _CodeTrainer(
        backend,
        config,
        run=run,
        accelerator=accelerator or make_accelerator(config, backend),
        eval_batches=eval_batches,
        save_model=save_model or (lambda folder: save_pretrained(backend, folder)),
    )
    return trainer.train(batches)


def make_accelerator(config: CodeTrainingConfig, backend: nn.Module | None = None, *, cpu: bool = False) -> Accelerator:
    """An accelerator of the config's precision."""
    has_idle_parts = getattr(backend, "action_head", None) is not None  # they get no gradient from codes
    return Accelerator(
        mixed_precision=PRECISIONS[config.dtype],
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=has_idle_parts)],
    )


class _CodeTrainer:
    """One run. Arguments as in `train_codes`."""

    def __init__(
        self,
        backend: ComposedBackend,
        config: CodeTrainingConfig,
        *,
        run: RunFolder,
        accelerator: Accelerator,
        eval_batches: Iterable[FoundationBatch] | Mapping[str, Iterable[FoundationBatch]] | None,
        save_model: Callable[[Path], Any],
    ):
        self.backend = backend
        self.config = config
        self.run = run
        self.accelerator = accelerator
        self.eval_batches: Any = eval_batches
        self.save_model = save_model
        set_seed(config.seed, device_specific=True)
        backend.setup(device=accelerator.device)
        parameters = [p for p in backend.parameters() if p.requires_grad]
        if not any(p.requires_grad for part in (backend.core, backend.code_head) for p in part.parameters()):
            raise ValueError(
                f"backend '{backend.name}': expected parameters to train that the loss on codes reaches, got none, as "
                "the backbone is frozen. Next step: freeze_backbone=False, or train_vocabulary=code_rows, which trains "
                "the code tokens alone."
            )
        optimizer = torch.optim.AdamW(parameters, betas=config.betas, weight_decay=config.weight_decay)
        self.parameters = parameters
        self.objective, self.optimizer = accelerator.prepare(
            TrainingObjective(backend, BackendMode(config.mode)), optimizer
        )
        self.drawn = Drawn(backend.codebook_size, backend.code_seq_len)
        self.evaluation: CodeEvaluation | None = None
        self.by_source: dict[str, CodeEvaluation] = {}
        self.step = 0

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, batches: Iterable[FoundationBatch] | SeekableBatches | MixedBatches) -> CodeTrainingResult:
        config, is_main = self.config, self.accelerator.is_main_process
        stream = self._continue_or_start(batches)
        progress = tqdm(total=config.steps, initial=self.step, unit="step", desc="codes", disable=not is_main)
        window = Window()
        self.backend.train()
        with StopRequest() as stop, progress:
            while self.step < config.steps:
                start = time.perf_counter()
                parts = stream.next_parts()
                output, grad_norm = self._update(parts)
                self.step += 1
                num_samples = sum(batch.batch_size for _, batch in parts)
                window.add(output, grad_norm, num_samples, time.perf_counter() - start)
                progress.update()
                if is_due(self.step, config.log_freq, config.steps):
                    progress.set_postfix(shorten(self._log(window, stream)))
                    window = Window()
                if self.eval_batches is not None and is_due(self.step, config.eval_freq, config.steps):
                    self._evaluate(progress)
                is_stopping = self._agree(stop.requested)
                if is_stopping or is_due(self.step, config.save_freq, config.steps):
                    self._save(stream)
                if is_stopping:
                    break
        self.accelerator.wait_for_everyone()
        if self.step < config.steps and is_main:
            print(
                f"Stopped after step {self.step} of {config.steps}, which is saved in {self.run.last}. "
                "Run the same command again to continue."
            )
        return CodeTrainingResult(
            self.run.last / MODEL,
            step=self.step,
            is_finished=self.step == config.steps,
            evaluation=self.evaluation,
            by_source=self.by_source,
            drawn=self._drawn_record(stream),
        )

    def _update(self, parts: list[tuple[str, FoundationBatch]]) -> tuple[LossOutput, float]:
        for source, batch in parts:
            self.drawn.add(source, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        output = self.objective(merge_batches([batch for _, batch in parts]))
        if not bool(torch.isfinite(output.loss)):
            raise ValueError(
                f"loss at step {self.step + 1}: expected a finite number, got {output.loss.item()}. "
                "Next step: lower lr, or use dtype=bfloat16 instead of float16; the newest checkpoint is in "
                f"{self.run.folder}."
            )
        self.accelerator.backward(output.loss)
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return output, float(grad_norm) if grad_norm is not None else 0.0

    def _log(self, window: Window, stream: Stream) -> dict[str, Any]:
        record = {
            "step": self.step,
            "epoch": stream.epoch,
            **window.means(),
            "constant_accuracy": self.drawn.all_codes.constant_accuracy(),
            "lr": learning_rate(self.config, self.step - 1),
            "samples_per_s": window.num_samples * self.accelerator.num_processes / max(window.seconds, 1e-9),
        }
        if isinstance(stream, MixedStream):
            record["drawn"] = self._drawn_record(stream)
        if self.accelerator.is_main_process:
            self.run.log(record)
        return record

    def _drawn_record(self, stream: Stream) -> dict[str, dict[str, Any]]:
        epochs = stream.epochs if isinstance(stream, MixedStream) else {"": stream.epoch}
        return self.drawn.record(epochs, num_processes=self.accelerator.num_processes)

    def _evaluate(self, progress: tqdm) -> None:
        assert self.eval_batches is not None
        record: dict[str, Any] = {"step": self.step}
        common: dict[str, Any] = {"training_counts": self.drawn.all_codes, "precision": self.accelerator.autocast()}
        if isinstance(self.eval_batches, Mapping):
            self.by_source, self.evaluation = evaluate_sources(
                self.backend, self.eval_batches, source_counts=self.drawn.codes, **common
            )
            record["by_source"] = {source: evaluation.as_dict() for source, evaluation in self.by_source.items()}
        else:
            self.evaluation = evaluate_codes(self.backend, self.eval_batches, **common)
        if self.accelerator.is_main_process:
            self.run.log({**record, "evaluation": self.evaluation.as_dict()})
            for source, evaluation in {**self.by_source, "": self.evaluation}.items():
                progress.write(
                    f"step {self.step}: held-out code accuracy {evaluation.code_accuracy:.3f} "
                    f"(constant prediction {evaluation.constant_accuracy:.3f}, loss {evaluation.loss:.4f})"
                    + (f" in {source}" if source else " in all" if self.by_source else "")
                )

    def _agree(self, is_stopping: bool) -> bool:
        """Whether any process was interrupted: all of them must stop after the same step."""
        if self.accelerator.num_processes == 1:
            return is_stopping
        flag = torch.tensor(float(is_stopping), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)  # type: ignore[operator]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, stream: Stream) -> None:
        random_states = gather_object([capture_random_state()])
        scaler = self.accelerator.scaler  # of float16 alone
        if self.accelerator.is_main_process:
            with self.run.new_checkpoint(self.step) as folder:
                (folder / MODEL).mkdir()
                self.save_model(folder / MODEL)
                state = folder / STATE
                state.mkdir()
                save_optimizer(self.optimizer, state)
                for rank, random_state in enumerate(random_states):
                    save_random_state(random_state, state, name=f"random_{rank}")
                write_json(
                    state / "progress.json",
                    {
                        "step": self.step,
                        "num_processes": self.accelerator.num_processes,
                        "loss_scale": scaler.state_dict() if scaler is not None else None,
                        "stream": stream.state(),
                        "drawn": self.drawn.state(),
                        "evaluation": self.evaluation.as_dict() if self.evaluation is not None else None,
                        "by_source": {source: evaluation.as_dict() for source, evaluation in self.by_source.items()},
                    },
                )
        self.accelerator.wait_for_everyone()

    def _continue_or_start(self, batches: Iterable[FoundationBatch] | SeekableBatches | MixedBatches) -> Stream:
        checkpoint = self.run.latest_checkpoint()
        if checkpoint is None:
            if self.accelerator.is_main_process:
                self.run.forget_after(0)
            return open_stream(batches)
        progress = read_json(checkpoint / STATE / "progress.json")
        if progress["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint}: expected {progress['num_processes']} process(es), with which the run was started, got "
                f"{self.accelerator.num_processes}. Next step: launch as many, or start a new run."
            )
        load_tensors(self.backend, checkpoint / MODEL / WEIGHTS)
        load_optimizer(self.optimizer, checkpoint / STATE)
        if self.accelerator.scaler is not None and progress.get("loss_scale"):
            self.accelerator.scaler.load_state_dict(progress["loss_scale"])
        self.step = progress["step"]
        self.drawn.restore(progress["drawn"])
        self.evaluation = CodeEvaluation.from_dict(progress["evaluation"]) if progress["evaluation"] else None
        self.by_source = {source: CodeEvaluation.from_dict(of) for source, of in progress["by_source"].items()}
        if self.accelerator.is_main_process:
            self.run.repair_last()
            self.run.forget_after(self.step)
            logger.info("Continuing after step %d from %s", self.step, checkpoint)
        stream = open_stream(batches, progress["stream"])
        restore_random_state(load_random_state(checkpoint / STATE, name=f"random_{self.accelerator.process_index}"))
        return stream
