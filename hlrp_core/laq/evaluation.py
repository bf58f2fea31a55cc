"""Measures a LAQ on frame tuples: reconstruction, use of the codebook, and the action probe beside its controls."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hlrp_core.expectation import expect
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

logger = logging.getLogger(__name__)


def expect_some(which: str, num_pairs: int) -> None:
    expect(num_pairs > 0, f"{which} pairs", "1 or more", num_pairs, "Use longer episodes, or a smaller laq.frame_gap.")


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
    expect_some("held-out", count)
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
    expect_some("held-out", len(held_out))
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


def perplexity_figures(use: CodebookUse) -> dict[str, Any]:
    return {"perplexity": use.perplexity, "perplexity_by_position": use.perplexities.tolist()}


def _use_figures(use: CodebookUse) -> dict[str, Any]:
    return perplexity_figures(use) | {"used_share": use.used_share, "code_counts": use.counts.tolist()}


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
        laq.calibrate(calibration_batches(tuples, torch.device("cpu")))
    return laq.eval()


def calibration_batches(tuples: FrameTuples, device: torch.device) -> Iterator[Tensor]:
    return (frames.to(device) for frames in tuples.spread(4096).batches(256))
