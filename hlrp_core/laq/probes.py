"""What the codes are worth: use of the codebook, reconstruction against the copy baseline, and the action probe.

Shape legend: N pairs, S code positions, K codebook size, A action width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class CodebookCollapseError(ValueError):
    """Nearly all pairs get the same codes: the labels would say nothing."""


@dataclass(frozen=True)
class CodebookUse:
    """Args:
    counts: `[S, K]` how often each code stood at each position.
    perplexities: `[S]` exp(entropy) at each position: codes in effective use, between 1 and K.
    perplexity: their mean.
    used_share: share of the S * K entries that occurred at all.
    """

    counts: Tensor
    perplexities: Tensor
    perplexity: float
    used_share: float


def measure_codebook_use(codes: Tensor, codebook_size: int) -> CodebookUse:
    """Use of the codebook by codes `[N, S]`."""
    counts = F.one_hot(codes.long(), codebook_size).sum(0)  # (S, K)
    shares = counts / counts.sum(1, keepdim=True)
    perplexities = (-torch.special.xlogy(shares, shares).sum(1)).exp()  # (S,)
    return CodebookUse(counts, perplexities, perplexities.mean().item(), (counts > 0).float().mean().item())


# A position below it has nearly always the same code.
COLLAPSED_PERPLEXITY = 1.05
# Below so many pairs a small perplexity says little: a single pair has 1, whatever its codes.
MIN_PAIRS_TO_JUDGE = 32


def collapsed_positions(use: CodebookUse) -> list[int]:
    """The positions, counted from 0, whose codes carry next to nothing."""
    return (use.perplexities < COLLAPSED_PERPLEXITY).nonzero().flatten().tolist()


def check_no_collapse(use: CodebookUse, codebook_size: int) -> None:
    """Raises:
    CodebookCollapseError: the codes of a position carry next to nothing.
    """
    collapsed = collapsed_positions(use)
    if collapsed:
        num_positions = len(use.perplexities)
        got = ", ".join(f"{use.perplexities[position]:.2f} at position {position + 1}" for position in collapsed)
        fewer = "" if len(collapsed) == num_positions else ", fewer positions (laq.code_seq_len)"
        raise CodebookCollapseError(
            f"codebook: expected codes that tell transitions apart at each of {num_positions} positions, got a "
            f"perplexity of {got}, of {codebook_size}: the codes have collapsed. Next step: use laq.quantizer=fsq, a "
            f"larger frame_gap (so that something moves){fewer}, a smaller learning rate, or more steps."
        )


class CollapseWatch:
    """Ends a training whose codes have collapsed for good.

    A position may be lost for a while and come back, as when dead codes are replaced: only one that is found collapsed
    `patience` times in a row is an error.
    """

    def __init__(self, patience: int = 3):
        self.patience = patience
        self._times: dict[int, int] = {}

    def look(self, use: CodebookUse, codebook_size: int) -> None:
        """Raises:
        CodebookCollapseError: a position is collapsed, and was at the last `patience - 1` looks.
        """
        self._times = {position: self._times.get(position, 0) + 1 for position in collapsed_positions(use)}
        if max(self._times.values(), default=0) >= self.patience:
            check_no_collapse(use, codebook_size)


def has_motion_to_tell(motion: Tensor) -> bool:
    """Whether any of the motions `[N, A]` differs from another: without that an R² has no meaning."""
    return len(motion) > 1 and bool((motion != motion[0]).any())


def one_hot_features(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes `[N, S]` -> `[N, S * K + 1]` float64, the last column a constant."""
    features = F.one_hot(codes.long(), codebook_size).flatten(1).double()
    return torch.cat([features, torch.ones(len(codes), 1, dtype=torch.float64)], dim=1)


def action_probe_r2(
    train_codes: Tensor, train_motion: Tensor, test_codes: Tensor, test_motion: Tensor, *, codebook_size: int
) -> float:
    """R² on the test pairs of a ridge regression from one-hot codes to motion, its penalty 1e-3 per sample.

    Args:
        train_codes, test_codes: `[N, S]`.
        train_motion, test_motion: `[N, A]`: what each pair's actions do over the gap, normalised.

    Returns:
        1 minus the residual's share of the variance, over all action dimensions; below 0 is worse than the mean.
    """
    x, y = one_hot_features(train_codes, codebook_size), train_motion.double()
    penalty = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0  # the constant is free
    weights = torch.linalg.lstsq(x.T @ x + penalty, x.T @ y, driver="gelsd").solution
    target = test_motion.double()
    if not has_motion_to_tell(target):
        raise ValueError(
            f"action probe: expected held-out pairs whose motion differs, got {len(target)} without any difference. "
            "Next step: hold out more episodes (eval_share)."
        )
    residual = (target - one_hot_features(test_codes, codebook_size) @ weights).square().sum()
    return 1 - (residual / (target - target.mean(0)).square().sum()).item()


def psnr_gain_db(reconstruction_error: float, copy_error: float) -> float:
    """How many dB the reconstruction is better than a copy of frame t, from the two mean squared errors."""
    return 10 * torch.log10(torch.tensor(copy_error / max(reconstruction_error, 1e-12))).item()
