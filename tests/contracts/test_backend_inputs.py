"""Which inputs a prediction of every registered backend depends on, and which it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_helpers import (
    ACTIONS,
    ALL_HEADS,
    CODES,
    HEADS_AND_SETTINGS,
    assert_unchanged,
    conditioning_of,
    predicted,
    rows_of,
    snapshot,
    total_loss,
)

from hlrp_core import (
    SamplingOptions,
)
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import ActionBatch

# -- only frame t reaches the student ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("alike_noise")
@pytest.mark.parametrize(("head", "settings"), HEADS_AND_SETTINGS)
def test_other_frames_change_nothing(build, head, settings):
    backend = build(head, **settings).train()
    batch = fake_batch(backend, num_frames=3)
    frames = batch.frames.clone()
    frames[:, 1:] = 255 - frames[:, 1:]
    other, alone = replace(batch, frames=frames), replace(batch, frames=batch.frames[:, :1].clone())
    for mode in backend.modes:
        losses = [total_loss(backend, each, mode) for each in (batch, other, alone)]
        for output in losses[1:]:
            assert torch.equal(output.loss, losses[0].loss)
            assert torch.equal(output.per_sample, losses[0].per_sample)
            assert output.metrics.keys() == losses[0].metrics.keys()
        if mode != ACTIONS:
            latents = [backend.latent_from_batch(each, mode=mode) for each in (batch, other, alone)]
            assert all(torch.equal(predicted(latent), predicted(latents[0])) for latent in latents)
    if head is not None:
        noise = SamplingOptions(noise=torch.randn(3, 4, 2))
        chunks = [backend.predict_action_chunk(each, sampling=noise).actions for each in (batch, other, alone)]
        assert all(torch.equal(chunk, chunks[0]) for chunk in chunks)


def test_frame_t_and_the_words_do_change_the_prediction(build):
    backend = build()
    batch = fake_batch(backend)
    logits = predicted(backend.latent_from_batch(batch, mode=CODES))
    seen = predicted(backend.latent_from_batch(replace(batch, frames=255 - batch.frames), mode=CODES))
    heard = predicted(backend.latent_from_batch(replace(batch, instructions=["stop", "stop", "stop"]), mode=CODES))
    assert (seen - logits).abs().amax((1, 2)).min() > 0
    assert (heard - logits).abs().amax((1, 2)).min() > 0


def test_labels_change_no_prediction(name, build):
    backend = build("prefix_flow", code_conditioning=conditioning_of(name))
    batch = fake_batch(backend)
    noise = SamplingOptions(noise=torch.randn(3, 4, 2))
    bare = ActionBatch(batch.frames, batch.instructions, state=batch.state)
    assert torch.equal(
        backend.predict_action_chunk(batch, sampling=noise).actions,
        backend.predict_action_chunk(bare, sampling=noise).actions,
    )
    assert torch.equal(
        predicted(backend.latent_from_batch(batch, mode=CODES)), predicted(backend.latent_from_batch(bare, mode=CODES))
    )


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alike_noise")
@pytest.mark.parametrize(("head", "settings"), HEADS_AND_SETTINGS)
def test_order_and_size_of_the_batch_change_nothing(build, head, settings):
    backend = build(head, **settings).eval()
    batch = fake_batch(backend, batch_size=4)
    noise = torch.randn(4, 4, 2)
    order = [3, 1, 0, 2]
    codes = predicted(backend.latent_from_batch(batch, mode=CODES))
    per_sample = {mode: total_loss(backend, batch, mode).per_sample for mode in backend.modes}
    for rows in (order, [2], [0, 3]):
        part = rows_of(batch, rows)
        torch.testing.assert_close(
            predicted(backend.latent_from_batch(part, mode=CODES)), codes[rows], rtol=0, atol=1e-4
        )
        for mode, whole in per_sample.items():
            losses = total_loss(backend, part, mode).per_sample
            torch.testing.assert_close(losses, whole[rows], rtol=0, atol=1e-4)
    if head is not None:
        actions = backend.predict_action_chunk(batch, sampling=SamplingOptions(noise=noise)).actions
        for rows in (order, [2], [0, 3]):
            sampling = SamplingOptions(noise=noise[rows])
            part = backend.predict_action_chunk(rows_of(batch, rows), sampling=sampling).actions
            torch.testing.assert_close(part, actions[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_batches_and_modes_are_left_as_they_were(build, head):
    backend = build(head).train()
    backend.core.eval()  # a caller's own choice must survive, module by module
    were = {key: module.training for key, module in backend.named_modules()}
    batch = fake_batch(backend)
    before = snapshot(batch)
    for mode in backend.modes:
        total_loss(backend, batch, mode)
        if mode != ACTIONS:
            latent = backend.latent_from_batch(batch, mode=mode)
            assert not predicted(latent).requires_grad
    if head is not None:
        assert not backend.predict_action_chunk(batch).actions.requires_grad
    assert {key: module.training for key, module in backend.named_modules()} == were
    assert torch.is_grad_enabled()
    assert_unchanged(batch, before)


def test_modes_come_back_after_an_error(build):
    backend = build().train()
    broken = replace(fake_batch(backend), instructions=["word " * 5000] * 3)
    with pytest.raises(ValueError, match="prompt"):
        backend.latent_from_batch(broken, mode=CODES)
    assert backend.training
    assert torch.is_grad_enabled()


def test_predictions_ignore_training_mode(build):
    backend = build("flow")
    batch, sampling = fake_batch(backend), SamplingOptions(noise=torch.randn(3, 4, 2))
    results = []
    for training in (True, False):
        backend.train(training)
        results.append(backend.predict_action_chunk(batch, sampling=sampling).actions)
    assert torch.equal(*results)


def test_several_views(build):
    backend = build("prefix_flow")
    batch = fake_batch(backend)
    views = {name: torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8) for name in ("wrist", "side")}
    noise = SamplingOptions(noise=torch.randn(3, 4, 2))
    one = backend.predict_action_chunk(replace(batch, views=views), sampling=noise).actions
    renamed = {f"other_{name}": view for name, view in views.items()}  # another robot calls them differently
    assert torch.equal(one, backend.predict_action_chunk(replace(batch, views=renamed), sampling=noise).actions)
    reordered = {name: views[name] for name in ("side", "wrist")}
    assert not torch.equal(one, backend.predict_action_chunk(replace(batch, views=reordered), sampling=noise).actions)
    changed = {**views, "wrist": 255 - views["wrist"]}
    assert not torch.equal(one, backend.predict_action_chunk(replace(batch, views=changed), sampling=noise).actions)
    small = {"wrist": views["wrist"][:, :24, :24]}
    with pytest.raises(ValueError, match="views"):
        backend.predict_action_chunk(replace(batch, views=small))
