"""What goes into a backbone: prompts as ids, padded batches of them, and images.

Shape legend: B batch, L tokens, N new tokens, P position axes (1, or 3 for multimodal rope).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hlrp_core.prompting.prompt import PaddingSide


@dataclass(frozen=True)
class ImageInputs:
    """Images as the backbone takes them, and what stands for each of them in a prompt.

    Args:
        tensors: keyword arguments of the model's forward, such as `pixel_values`.
        layouts: one hashable layout for each image, in order: equal layouts have equal tokens and positions.
    """

    tensors: dict[str, Tensor]
    layouts: list[tuple[int, ...]]


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as ids.

    Args:
        ids: `[L]` long.
        positions: `[P, L]` long.
    """

    ids: Tensor
    positions: Tensor

    @property
    def next_position(self) -> int:
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch of token sequences.

    Args:
        ids: `[B, L]` long.
        valid_mask: `[B, L]` bool, False on padding.
        positions: `[P, B, L]` long.
        next_position: `[B]` long: where each sequence continues.
        is_padded: whether any row has padding, known without asking the device.
        padding_side: where that padding is.
    """

    ids: Tensor
    valid_mask: Tensor
    positions: Tensor
    next_position: Tensor
    is_padded: bool
    padding_side: PaddingSide

    @classmethod
    def pad(cls, prompts: list[EncodedPrompt], *, pad_id: int, side: PaddingSide, device: torch.device) -> TokenBatch:
        """Stack prompts of different length, padding on `side`."""
        lengths = [len(p.ids) for p in prompts]
        longest = max(lengths)
        if min(lengths) == longest:
            ids, positions = (
                torch.stack([p.ids for p in prompts]),
                torch.stack([p.positions for p in prompts], dim=1),
            )
            valid_mask = torch.ones_like(ids, dtype=torch.bool)
        else:
            ids = torch.full((len(prompts), longest), pad_id)
            positions = torch.zeros((prompts[0].positions.shape[0], *ids.shape), dtype=torch.long)
            valid_mask = torch.zeros(ids.shape, dtype=torch.bool)
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                where = slice(longest - length, longest) if side == "left" else slice(0, length)
                ids[row, where], positions[:, row, where], valid_mask[row, where] = (
                    prompt.ids,
                    prompt.positions,
                    True,
                )
        return cls(
            ids=ids.to(device, non_blocking=True),
            valid_mask=valid_mask.to(device, non_blocking=True),
            positions=positions.to(device, non_blocking=True),
            next_position=torch.tensor([p.next_position for p in prompts], device=device),
            is_padded=min(lengths) < longest,
            padding_side=side,
        )

    def append(self, new_ids: Tensor) -> TokenBatch:
        """The same batch with `new_ids` `[B, N]` at the end of every row; right padding stays at the right."""
        grown = self.continuation(new_ids)
        ids, mask = torch.cat([self.ids, new_ids], dim=1), grown.valid_mask
        positions = torch.cat([self.positions, grown.positions], dim=2)
        if self.is_padded and self.padding_side == "right":
            # a stable sort by "is padding" closes the gap between prompt and completion, row by row
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # (B, L + N)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
            positions = positions.gather(2, order.expand_as(positions))
        return replace(grown, ids=ids, valid_mask=mask, positions=positions)

    def continuation(self, new_ids: Tensor) -> TokenBatch:
        """Only `new_ids` `[B, N]`, to be run over a cache of this batch; the mask covers both."""
        steps = torch.arange(new_ids.shape[1], device=new_ids.device)
        positions = self.next_position[:, None] + steps  # (B, N)
        return replace(
            self,
            ids=new_ids,
            valid_mask=torch.cat([self.valid_mask, torch.ones_like(new_ids, dtype=torch.bool)], dim=1),
            positions=positions.expand(self.positions.shape[0], -1, -1),
            next_position=self.next_position + new_ids.shape[1],
        )
