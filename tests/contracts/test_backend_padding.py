"""On which side prompts are padded changes no loss of any registered backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_helpers import CODES, OTHER_SETTINGS, conditioning_of, total_loss

from hlrp_core.backends.fake_batch import fake_batch


@pytest.mark.usefixtures("alike_noise")
@pytest.mark.parametrize("settings", [{}, {"latent_pooling": "last"}, OTHER_SETTINGS], ids=["usual", "last", "other"])
def test_the_padding_side_changes_no_loss(name, build, settings):
    conditioning = conditioning_of(name)
    backend = build("prefix_flow", code_conditioning=conditioning, code_source="teacher", **settings).eval()
    batch = fake_batch(backend, batch_size=4)
    losses = {}
    for side in ("left", "right"):
        prompting = backend.prompting
        backend.prompting = type(prompting)(backend.core, replace(prompting.config, padding_side=side))
        valid_mask = backend._prompt(batch, for_prediction=False).tokens.valid_mask
        lengths = valid_mask.sum(1)
        assert lengths.min() < lengths.max()
        shortest = valid_mask[lengths.argmin()]
        assert (shortest[0], shortest[-1]) == ((False, True) if side == "left" else (True, False))
        losses[side] = {mode: total_loss(backend, batch, mode).per_sample for mode in backend.modes}
    for mode in backend.modes:
        torch.testing.assert_close(losses["left"][mode], losses["right"][mode], rtol=0, atol=1e-4)
    assert losses["left"][CODES].std() > 1e-3
