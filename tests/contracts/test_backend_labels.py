"""Labels that are missing, partial or wrong, and how the losses of a mode add up, in every registered backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_helpers import ACTIONS, CODES, HEADS, MULTITASK, OTHER_SETTINGS, gradients, rows_of, total_loss

from hlrp_core import (
    BackendMode,
)
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import FoundationBatch


def test_missing_labels_are_errors(build):
    backend = build("mlp")
    batch = fake_batch(backend)
    no_codes = replace(batch, target_codes=None)
    for mode in (CODES, MULTITASK):
        with pytest.raises(ValueError, match="target_codes"):
            backend.loss_from_batch(no_codes, mode=mode)
    no_actions = replace(batch, actions=None, action_is_pad=None)
    foundation = FoundationBatch(batch.frames, batch.instructions, batch.target_codes)
    for mode in (ACTIONS, MULTITASK):
        for lacking in (no_actions, foundation):
            with pytest.raises(ValueError, match="ActionBatch with actions"):
                backend.loss_from_batch(lacking, mode=mode)
    backend.loss_from_batch(foundation, mode=CODES)
    backend.loss_from_batch(no_codes, mode=ACTIONS)


@pytest.mark.parametrize("code", [-1, 8, 100])
def test_codes_out_of_range_are_errors_where_they_are_valid(build, code):
    backend = build()
    batch = fake_batch(backend)
    codes = batch.target_codes.clone()
    codes[1, 2] = code
    with pytest.raises(ValueError, match=r"\[0, 8\).*" + str(code)):
        backend.loss_from_batch(replace(batch, target_codes=codes), mode=CODES)
    valid = torch.tensor([True, False, True])
    backend.loss_from_batch(replace(batch, target_codes=codes, codes_valid=valid), mode=CODES)


def test_codes_of_another_length_are_errors(build):
    backend = build()
    batch = fake_batch(backend)
    with pytest.raises(ValueError, match=r"\[B, 4\].*\(3, 5\)"):
        backend.loss_from_batch(replace(batch, target_codes=torch.zeros(3, 5, dtype=torch.long)), mode=CODES)


@pytest.mark.parametrize(("head", "settings"), [*[(head, {}) for head in HEADS], ("prefix_flow", OTHER_SETTINGS)])
def test_nan_fillers_of_unlabelled_samples_do_no_harm(build, head, settings):
    backend = build(head, **settings).train()
    batch = fake_batch(backend)
    valid = torch.tensor([True, False, True])
    actions, state = batch.actions.clone(), batch.state.clone()
    actions[1] = state[1] = float("nan")
    filled = replace(batch, actions=actions, action_valid=valid, state=state)
    for mode in (ACTIONS, MULTITASK):
        output = total_loss(backend, filled, mode)
        output.loss.backward()
        assert output.loss.isfinite()
        assert output.per_sample.isfinite().all()
        assert all(grad.isfinite().all() for grad in gradients(backend).values())
        backend.zero_grad()
    padded = batch.actions.clone()
    padded[0, -1] = float("nan")  # `action_is_pad` says so
    assert total_loss(backend, replace(batch, actions=padded), ACTIONS).loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_a_broken_state_of_a_labelled_sample_is_an_error(build, head):
    backend = build(head, code_source="teacher")
    batch = fake_batch(backend)
    state = batch.state.clone()
    state[1, 0], state[2, 2] = float("inf"), float("nan")
    broken = replace(batch, state=state, action_valid=torch.tensor([True, True, False]))
    for mode in (ACTIONS, MULTITASK):
        with pytest.raises(ValueError, match=r"state: expected finite numbers.* in samples \[1\].*Next step"):
            backend.loss_from_batch(broken, mode=mode)
    assert backend.loss_from_batch(broken, mode=CODES).loss.isfinite()
    if backend.action_head.needs_codes:  # without a teacher's code the action does not supervise
        unlabelled = replace(broken, codes_valid=torch.tensor([True, False, True]))
        assert backend.loss_from_batch(unlabelled, mode=ACTIONS).loss.isfinite()
    with pytest.raises(ValueError, match=r"state: expected finite numbers.* in samples \[1, 2\].*Next step"):
        backend.predict_action_chunk(broken)


@pytest.mark.parametrize(("head", "settings"), [*[(head, {}) for head in HEADS], ("prefix_flow", OTHER_SETTINGS)])
def test_a_batch_with_none_of_a_kind_gives_that_loss_weight_zero(build, head, settings):
    backend = build(head, **settings).train()
    batch = fake_batch(backend)
    nothing = torch.zeros(3, dtype=torch.bool)
    no_codes, no_actions = replace(batch, codes_valid=nothing), replace(batch, action_valid=nothing)

    neither = total_loss(backend, replace(no_codes, action_valid=nothing), MULTITASK)
    neither.loss.backward()  # still a graph: every process of several can run backward
    assert neither.loss.item() == 0
    assert neither.per_sample.tolist() == [0, 0, 0]
    assert not any(grad.any() for grad in gradients(backend).values())
    backend.zero_grad()

    assert total_loss(backend, no_codes, CODES).loss.item() == 0
    assert total_loss(backend, no_actions, ACTIONS).loss.item() == 0
    only_codes = total_loss(backend, no_actions, MULTITASK)
    assert only_codes.loss.item() == pytest.approx(total_loss(backend, batch, CODES).loss.item(), abs=1e-5)
    only_actions = total_loss(backend, no_codes, MULTITASK)
    assert only_actions.metrics["actions_loss"] == pytest.approx(only_actions.loss.item(), abs=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_partial_labels_give_the_gradient_of_the_labelled_samples(build, head):
    """Codes for samples 0 and 1, actions for 1 and 2: each loss is the mean over its own labelled samples."""
    noise_free = head in ("mlp", "laq")
    backend = build(head, code_source="teacher" if noise_free else "predicted").train()
    batch = fake_batch(backend)
    has_codes, has_actions = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    actions = batch.actions.clone()
    actions[0] = float("nan")
    partial = replace(batch, codes_valid=has_codes, action_valid=has_actions, actions=actions)

    codes_alone = total_loss(backend, rows_of(batch, [0, 1]), CODES)
    codes_alone.loss.backward()
    expected = gradients(backend)
    backend.zero_grad()
    output = total_loss(backend, partial, CODES)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(codes_alone.loss.item(), abs=1e-5)
    for key, grad in gradients(backend).items():
        torch.testing.assert_close(grad, expected.get(key, torch.zeros_like(grad)), rtol=1e-4, atol=1e-5, msg=key)
    backend.zero_grad()

    if noise_free:  # teacher codes: an action counts where the sample has codes too
        actions_alone = total_loss(backend, rows_of(batch, [1]), ACTIONS)
        assert total_loss(backend, partial, ACTIONS).loss.item() == pytest.approx(actions_alone.loss.item(), abs=1e-5)
    both = total_loss(backend, partial, MULTITASK)
    assert both.metrics["codes_loss"] == pytest.approx(codes_alone.loss.item(), abs=1e-5)
    assert both.per_sample[0] > 0


def test_weights_of_the_losses(build):
    backend = build("mlp", code_source="teacher", codes_loss_weight=0.5, actions_loss_weight=3.0).train()
    batch = fake_batch(backend)
    codes, actions = (total_loss(backend, batch, mode).loss.item() for mode in (CODES, ACTIONS))
    assert total_loss(backend, batch, MULTITASK).loss.item() == pytest.approx(0.5 * codes + 3 * actions, abs=1e-5)


def test_per_sample_is_consistent_with_the_loss(build):
    for mode in BackendMode:
        backend = build("prefix_flow").train()
        batch = replace(
            fake_batch(backend),
            codes_valid=torch.tensor([True, True, False]),
            action_valid=torch.tensor([True, True, False]),
        )
        output = total_loss(backend, batch, mode)
        assert output.per_sample[2] == 0
        assert output.per_sample[:2].mean().item() == pytest.approx(output.loss.item(), abs=1e-5)
