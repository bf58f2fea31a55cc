"""Held-out code accuracy, by real decoding, beside the constant prediction that it must beat.

Shape legend: B batch, N samples, S code positions, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlrp_core.backends.composed import predicting
from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import ActionBatch, BackendMode, FoundationBatch, SamplingOptions, VLABackend
from hlrp_core.heads.code_vectors import lookup_vectors, mean_vectors, nearest_codes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


@dataclass(frozen=True)
class CodeEvaluation:
    """How well codes are predicted. Shares are in [0, 1]; samples without valid codes do not count.

    Of a backend that predicts vectors it counts the codes nearest to them, so that all backends can be compared.

    Args:
        num_samples: evaluated.
        code_accuracy: share of code positions predicted right, by real decoding.
        constant_accuracy: the same for the constant prediction: at each position the code that is most frequent
            in `constant_from`.
        joint_accuracy: share of samples with all S codes right.
        constant_joint_accuracy: the same for the constant prediction.
        position_accuracy: `code_accuracy` of each of the S positions.
        teacher_forced_accuracy: with the true codes before each position given.
        loss: teacher-forced, as in training.
        prediction_perplexity: 1 (always the same code) to K (all equally often), the mean over positions.
        target_perplexity: the same of the labels.
        unparsed: share of samples whose free decoding did not parse; they count as wrong.
        constant_from: what the constant prediction was counted on: `training` or `evaluation`.
        vector_r2: with predicted vectors: 1 - (their squared error) / (that of the constant mean vector).
    """

    num_samples: int
    code_accuracy: float
    constant_accuracy: float
    joint_accuracy: float
    constant_joint_accuracy: float
    position_accuracy: list[float]
    teacher_forced_accuracy: float
    loss: float
    prediction_perplexity: float
    target_perplexity: float
    unparsed: float
    constant_from: str
    vector_r2: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> CodeEvaluation:
        """Inverse of `as_dict`, also of what was written as JSON, where NaN is null."""
        absent = {name: math.nan for name, value in figures.items() if value is None and name != "vector_r2"}
        return cls(**{**figures, **absent})

    def as_table(self) -> str:
        """For a terminal."""
        positions = " ".join(f"{100 * share:.1f}" for share in self.position_accuracy)
        rows = [
            ("samples", f"{self.num_samples}", ""),
            ("code accuracy", f"{100 * self.code_accuracy:.1f}%", f"{100 * self.constant_accuracy:.1f}%"),
            ("all codes right", f"{100 * self.joint_accuracy:.1f}%", f"{100 * self.constant_joint_accuracy:.1f}%"),
            ("by position", f"{positions} %", ""),
            ("teacher-forced accuracy", f"{100 * self.teacher_forced_accuracy:.1f}%", ""),
            ("teacher-forced loss", f"{self.loss:.4f}", ""),
            ("perplexity (labels)", f"{self.prediction_perplexity:.2f} ({self.target_perplexity:.2f})", "1.00"),
        ]
        if self.vector_r2 is not None:
            rows.append(("vectors, R²", f"{self.vector_r2:.3f}", "0 (mean vector)"))
        if self.unparsed > 0:
            rows.append(("did not parse", f"{100 * self.unparsed:.1f}%", ""))
        width = max(len(value) for _, value, _ in rows)
        lines = [f"{'':<24} {'predicted':>{width}}  constant (most frequent in {self.constant_from})"]
        lines += [f"{name:<24} {value:>{width}}  {constant}".rstrip() for name, value, constant in rows]
        return "\n".join(lines)


def evaluate_codes(
    backend: VLABackend,
    batches: Iterable[FoundationBatch],
    *,
    training_counts: CodeCounts | None = None,
    max_batches: int | None = None,
    precision: AbstractContextManager | None = None,
) -> CodeEvaluation:
    """Decode codes for every labelled sample and compare them with the labels.

    Args:
        backend: predicts codes, or vectors of the LAQ that it names by `code_vectors` `[S, K, D]`; its modes of
            training and evaluation are left as they were.
        batches: labelled ones that it was not trained on.
        training_counts: codes of the training data, from which the constant prediction is made. Without them it is
            made from the evaluated labels themselves, the best that any constant could do.
        max_batches: evaluate the first ones alone.
        precision: a context for the computation, such as `torch.autocast(...)`.

    Raises:
        ValueError: no sample has a valid code.
    """
    with precision or nullcontext():
        predictions = _predict(backend, batches, max_batches)
    return _compare(backend, predictions, training_counts)


def evaluate_sources(
    backend: VLABackend,
    sources: Mapping[str, Iterable[FoundationBatch]],
    *,
    source_counts: Mapping[str, CodeCounts],
    training_counts: CodeCounts,
    precision: AbstractContextManager | None = None,
) -> tuple[dict[str, CodeEvaluation], CodeEvaluation]:
    """`evaluate_codes` for each of several sources, and for all their samples together; each is decoded once.

    Args:
        sources: held-out batches, by the name of the source.
        source_counts: codes of each source's training data: its constant prediction is made from them. One without is
            compared with the best constant of its own held-out labels.
        training_counts: codes of all training data, for the constant prediction for all samples together.
        precision: a context for the computation.

    Raises:
        ValueError: a source has no sample with a valid code.
    """
    with precision or nullcontext():
        predictions = {name: _predict(backend, batches) for name, batches in sources.items()}
    by_source = {name: _compare(backend, found, source_counts.get(name)) for name, found in predictions.items()}
    return by_source, _compare(backend, [one for found in predictions.values() for one in found], training_counts)


@dataclass(frozen=True)
class _Predicted:
    """Of one batch: codes `[B, S]` or vectors `[B, S, D]`, labels `[B, S]`, teacher-forced accuracy and loss."""

    predicted: Tensor
    labels: Tensor
    forced_accuracy: float
    loss: float


def _predict(
    backend: VLABackend, batches: Iterable[FoundationBatch], max_batches: int | None = None
) -> list[_Predicted]:
    """Raises:
    ValueError: no sample has a valid code.
    """
    found = []
    sampling = None
    if getattr(backend, "code_vectors", None) is not None:
        sampling = SamplingOptions(generator=torch.Generator().manual_seed(0))  # the same draws on every device
    with _evaluating(backend):
        for batch in islice(batches, max_batches):  # a loader, too, draws where a pass over it begins
            mask = batch.codes_mask()
            if not bool(mask.any()):
                continue
            assert batch.target_codes is not None
            labelled = select(batch, mask)
            output = backend.loss_from_batch(labelled, mode=BackendMode.CODES)
            latent = backend.latent_from_batch(labelled, mode=BackendMode.CODES, sampling=sampling)
            predicted = latent.tokens if latent.vector is None else latent.vector
            assert predicted is not None and labelled.target_codes is not None
            forced = output.metrics.get("code_accuracy", float("nan"))
            found.append(_Predicted(predicted.cpu(), labelled.target_codes.cpu(), forced, output.loss.item()))
    if not found:
        raise ValueError(
            "batches: expected at least one sample with valid codes, got none. Next step: check that the labels cover "
            "these episodes, and that episodes are longer than the frame gap."
        )
    return found


def _compare(backend: VLABackend, found: list[_Predicted], training_counts: CodeCounts | None) -> CodeEvaluation:
    predicted, labels = torch.cat([one.predicted for one in found]), torch.cat([one.labels for one in found])
    counts = CodeCounts(backend.codebook_size, backend.code_seq_len)
    counts.add(labels)
    constant = (training_counts or counts).most_frequent  # (S,)
    codes, vector_r2 = predicted, None  # (N, S)
    if predicted.ndim == 3:
        table = _vector_table(backend)
        codes = nearest_codes(predicted, table)
        vector_r2 = _vector_r2(predicted, labels, training_counts or counts, table)
    right = codes == labels
    constant_right = constant == labels
    return CodeEvaluation(
        num_samples=len(labels),
        code_accuracy=_share(right),
        constant_accuracy=_share(constant_right),
        joint_accuracy=_share(right.all(1)),
        constant_joint_accuracy=_share(constant_right.all(1)),
        position_accuracy=right.float().mean(0).tolist(),
        teacher_forced_accuracy=_weighted_mean([(one.forced_accuracy, len(one.labels)) for one in found]),
        loss=_weighted_mean([(one.loss, len(one.labels)) for one in found]),
        prediction_perplexity=mean_perplexity(codes[(codes >= 0).all(1)], backend.codebook_size),
        target_perplexity=mean_perplexity(labels, backend.codebook_size),
        unparsed=_share((codes < 0).any(1)),
        constant_from="training" if training_counts is not None else "evaluation",
        vector_r2=vector_r2,
    )


def _vector_table(backend: VLABackend) -> Tensor:
    """`[S, K, D]` of the LAQ whose vectors the backend predicts."""
    table = getattr(backend, "code_vectors", None)
    if table is None:
        raise ValueError(
            f"backend '{backend.name}': expected code_vectors [S, K, D], by which its vectors are compared with codes, "
            "got None. Next step: give the backend this property."
        )
    return table.float().cpu()


def _vector_r2(vectors: Tensor, labels: Tensor, counts: CodeCounts, table: Tensor) -> float:
    """Share of the variance of the labels' vectors, around the mean vector of `counts`, that `vectors` explain."""
    target = lookup_vectors(labels, table)  # (N, S, D)
    error = (vectors - target).square().sum()
    constant_error = (mean_vectors(counts.counts, table) - target).square().sum()
    return (1 - error / constant_error).item()


def count_codes(
    batches: Iterable[FoundationBatch], *, codebook_size: int, code_seq_len: int, max_batches: int | None = None
) -> CodeCounts:
    """Counts of the valid codes of some batches: what a constant prediction knows of the training data."""
    counts = CodeCounts(codebook_size, code_seq_len)
    for batch in islice(batches, max_batches):
        mask = batch.codes_mask()
        if batch.target_codes is not None and bool(mask.any()):
            counts.add(batch.target_codes[mask.to(batch.target_codes.device)])
    return counts


def select(batch: FoundationBatch, mask: Tensor) -> FoundationBatch:
    """The samples of `mask` `[B]` with what a code prediction sees and is compared with, and nothing else."""
    assert batch.target_codes is not None
    rows: list[int] = mask.nonzero().flatten().tolist()
    frames, codes = batch.frames[rows, :1], batch.target_codes[rows]
    instructions = [batch.instructions[row] for row in rows]
    if isinstance(batch, ActionBatch):
        views = {name: view[rows] for name, view in batch.views.items()}
        state = None if batch.state is None else batch.state[rows]  # a prompt may show it
        return ActionBatch(frames, instructions, codes, state=state, views=views)
    return FoundationBatch(frames, instructions, codes)


def mean_perplexity(codes: Tensor, codebook_size: int) -> float:
    """Perplexity of the codes `[N, S]` at each position, averaged over positions; NaN where N is 0."""
    if len(codes) == 0:
        return float("nan")
    counts = CodeCounts(codebook_size, codes.shape[1])
    counts.add(codes)
    share = counts.counts.double() / len(codes)  # (S, K)
    return torch.special.entr(share).sum(1).exp().mean().item()


@contextmanager
def _evaluating(backend: VLABackend) -> Iterator[None]:
    """No gradient, eval mode and the same random numbers every time; all is afterwards as it was.

    A flow's loss draws from torch's global generators. Its figures must not change from one evaluation of a model to
    the next, and a training run must not depend on how often it is evaluated.
    """
    module = backend if isinstance(backend, torch.nn.Module) else torch.nn.Module()
    gpus = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(gpus), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(0)
        with predicting(module):
            yield


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _weighted_mean(pairs: list[tuple[float, int]]) -> float:
    return sum(value * size for value, size in pairs) / sum(size for _, size in pairs)
