"""Random data of the right shapes: any backend can be tried in five lines."""

from __future__ import annotations

import torch

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.contract import ActionBatch

_INSTRUCTIONS = ("reach the red disc", "", "push the green block to the left of the table, slowly", "open the drawer")


def fake_batch(
    backend: ComposedBackend, *, batch_size: int = 3, num_frames: int = 2, image_side: int = 48, seed: int = 0
) -> ActionBatch:
    """A fully labelled batch that fits `backend`: instructions of several lengths, one chunk with a padded step.

    Args:
        num_frames: T; the frames after the first are for a teacher.
        image_side: H and W.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_frames, image_side, image_side, 3)
    frames = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    codes = torch.randint(0, backend.codebook_size, (batch_size, backend.code_seq_len), generator=rng)
    labels = {}
    if backend.action_head is not None:
        head = backend.action_head.config
        shape = (batch_size, head.chunk_size, head.action_dim)
        labels["actions"] = torch.randn(shape, generator=rng)
        labels["action_is_pad"] = torch.zeros(shape[:2], dtype=torch.bool)
        labels["action_is_pad"][0, -1] = head.chunk_size > 1
        if head.state_dim > 0:
            labels["state"] = torch.randn(batch_size, head.state_dim, generator=rng)
    if backend.config.prompt.state_text and "state" not in labels:
        labels["state"] = torch.randn(batch_size, 3, generator=rng)
    return ActionBatch(
        frames=frames,
        instructions=[_INSTRUCTIONS[i % len(_INSTRUCTIONS)] for i in range(batch_size)],
        target_codes=codes,
        **labels,
    )
