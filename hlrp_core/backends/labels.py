"""What of a batch may supervise a backend: its labels checked, and cleared where a sample has none.

Shape legend: B batch, S code positions, K codebook size, C chunk length, A action width, D state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hlrp_core.backends.config import BackendConfig
from hlrp_core.contract import ActionBatch, FoundationBatch
from hlrp_core.expectation import expect


def check_labels(batch: FoundationBatch, objectives: tuple[str, ...]) -> None:
    """Raises:
    ValueError: the batch has no labels at all for one of the objectives.
    """
    expect(
        "codes" not in objectives or batch.target_codes is not None,
        "loss_from_batch",
        "target_codes [B, S] to learn codes from",
        None,
        "label the data with a LAQ or a code table.",
    )
    expect(
        "actions" not in objectives or (isinstance(batch, ActionBatch) and batch.actions is not None),
        "loss_from_batch",
        "an ActionBatch with actions [B, C, A]",
        f"{type(batch).__name__} without actions",
        "use mode=codes, or data with actions.",
    )


def read_codes(batch: FoundationBatch, config: BackendConfig, device: torch.device) -> Tensor:
    """Codes `[B, S]` on `device`; those that may not supervise, which may be any filler, become 0.

    Raises:
        ValueError: there are none, or they do not fit the backend.
    """
    expect(batch.target_codes is not None, "target_codes", "[B, S]", None, "label the data with a LAQ or a code table.")
    assert batch.target_codes is not None
    codes, mask = batch.target_codes.to(device), batch.codes_mask().to(device)
    codes = torch.where(mask[:, None], codes, 0)
    check_codes(codes, "target_codes", batch_size=batch.batch_size, config=config)
    return codes


def check_codes(codes: Tensor, what: str, *, batch_size: int, config: BackendConfig) -> None:
    """Raises:
    ValueError: the codes are not long, `[B, S]` and in [0, K).
    """
    expect(
        codes.dtype == torch.long and codes.shape == (batch_size, config.code_seq_len),
        what,
        f"long [B, {config.code_seq_len}] (the backend's code_seq_len) with B={batch_size}",
        f"{str(codes.dtype).removeprefix('torch.')} {tuple(codes.shape)}",
        "label with a LAQ of this code length, or build the backend with the table's.",
    )
    low, high = map(int, codes.aminmax())
    expect(
        low >= 0 and high < config.codebook_size,
        what,
        f"codes in [0, {config.codebook_size})",
        f"{low} to {high}",
        "build the backend with the codebook size of the LAQ that made them.",
    )


def read_actions(batch: ActionBatch, mask: Tensor) -> Tensor:
    """Actions `[B, C, A]` on the device of `mask` `[B]`, 0 where it is False: fillers, such as NaN, reach no head."""
    assert batch.actions is not None
    return torch.where(mask[:, None, None], batch.actions.to(mask.device), 0)


def read_state(batch: ActionBatch, mask: Tensor) -> Tensor | None:
    """The state `[B, D]` on the device of `mask` `[B]`, 0 where it is False.

    A loss of 0 does not stop a NaN that it was computed from: the gradient would be 0 * NaN.

    Raises:
        ValueError: a state in `mask` is not finite.
    """
    if batch.state is None:
        return None
    state = batch.state.to(mask.device)
    is_broken = mask & ~state.isfinite().all(-1)  # (B,)
    if bool(is_broken.any()):
        raise ValueError(
            f"state: expected finite numbers, got NaN or infinity in samples {is_broken.nonzero().flatten().tolist()}. "
            "Next step: repair the state; in training, action_valid=False marks samples without an action label."
        )
    return torch.where(mask[:, None], state, 0)
