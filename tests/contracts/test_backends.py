"""What every backend promises: its modes, and its life. A new backend is tested by being registered.

Shape legend: B batch, S code positions, K codebook size, D width of a code vector, C chunk length,
A action width.
"""

from __future__ import annotations

import copy

import pytest
import torch
from backend_helpers import (
    ACTIONS,
    ALL_HEADS,
    CODES,
    HEADS,
    MULTITASK,
    conditioning_of,
    gradients,
    predicted,
    total_loss,
)

from hlrp_core import ActionPolicyBackend, BackendMode, UnsupportedModeError, VLABackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.heads.code_tokens import CodeTokenHead
from hlrp_core.registry import get_recipe

# -- protocol and modes -----------------------------------------------------------------------------------------------


def test_satisfies_the_protocols(build):
    assert isinstance(build(), VLABackend)
    assert isinstance(build("prefix_flow"), VLABackend)
    assert isinstance(build("prefix_flow"), ActionPolicyBackend)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_every_mode_it_names_and_no_other(name, build, head):
    backend = build(head)
    batch = fake_batch(backend)
    assert backend.name == name
    assert backend.modes == ({CODES} if head is None else set(BackendMode))
    for mode in BackendMode:
        if mode in backend.modes:
            output = total_loss(backend.train(), batch, mode)
            assert output.loss.shape == ()
            assert output.loss.requires_grad
            assert all(type(value) is float for value in output.metrics.values())
            assert output.per_sample.shape == (3,)
        else:
            with pytest.raises(UnsupportedModeError) as error:
                backend.loss_from_batch(batch, mode=mode)
            text = str(error.value)
            assert f"'{name}'" in text
            assert f"'{mode.value}'" in text
            assert "it has: codes" in text
            with pytest.raises(UnsupportedModeError):
                backend.latent_from_batch(batch, mode=mode)
    if head is None:
        with pytest.raises(UnsupportedModeError):
            backend.predict_action_chunk(batch)
    else:
        with pytest.raises(ValueError, match="predict_action_chunk"):
            backend.latent_from_batch(batch, mode=ACTIONS)


def test_mode_must_be_said(build):
    with pytest.raises(TypeError):
        build().loss_from_batch(fake_batch(build()))
    with pytest.raises(ValueError, match=r"expected one of codes, .*got 'kodes'.*Did you mean 'codes'"):
        build().loss_from_batch(fake_batch(build()), mode="kodes")


def test_metrics_of_each_mode(name, build):
    backend = build("prefix_flow").train()
    batch = fake_batch(backend)
    codes = {"codes_loss", "code_accuracy", "constant_accuracy"}
    if get_recipe(name).predicts_vectors:
        codes |= {"vector_loss", "constant_vector_loss"}
    assert set(total_loss(backend, batch, CODES).metrics) == codes
    assert set(total_loss(backend, batch, ACTIONS).metrics) == {"actions_loss"}
    assert set(total_loss(backend, batch, MULTITASK).metrics) == {*codes, "actions_loss"}


@pytest.mark.parametrize("head", ALL_HEADS)
def test_shapes_of_predictions(name, build, head):
    backend = build(head)
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES)
    if get_recipe(name).predicts_vectors:
        assert latent.vector.shape == (3, 4, 2)
        assert latent.vector.dtype == torch.float32
        assert (latent.tokens, latent.logits) == (None, None)  # nothing is quantised
    else:
        assert latent.tokens.shape == (3, 4)
        assert latent.tokens.dtype == torch.long
        assert latent.logits.shape == (3, 4, 8)
        assert torch.equal(latent.logits.argmax(-1), latent.tokens)
        assert latent.vector is None
    if head is not None:
        output = backend.predict_action_chunk(batch)
        assert output.actions.shape == (3, 4, 2)
        assert output.actions.dtype == torch.float32
        assert output.actions.isfinite().all()
        assert (output.latent is not None) == backend.action_head.needs_codes


# -- life of a backend ------------------------------------------------------------------------------------------------


def test_setup_may_be_called_again(build):
    backend = build()
    batch = fake_batch(backend)
    before = predicted(backend.latent_from_batch(batch, mode=CODES))
    names = list(backend.state_dict())
    backend.setup(device=torch.device("cpu"))
    assert list(backend.state_dict()) == names
    assert torch.equal(predicted(backend.latent_from_batch(batch, mode=CODES)), before)


def test_a_deep_copy_is_independent(build):
    backend = build()
    twin = copy.deepcopy(backend)
    batch = fake_batch(backend)
    before = predicted(backend.latent_from_batch(batch, mode=CODES))
    assert torch.equal(predicted(twin.latent_from_batch(batch, mode=CODES)), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(predicted(backend.latent_from_batch(batch, mode=CODES)), before)
    assert not torch.equal(predicted(twin.latent_from_batch(batch, mode=CODES)), before)


@pytest.mark.parametrize("head", HEADS)
def test_frozen_parts_get_no_gradient_and_learning_parts_do(build, head):
    backend = build(head, freeze_backbone=True).train()
    batch = fake_batch(backend)
    total_loss(backend, batch, ACTIONS).loss.backward()
    trained = set(gradients(backend))
    assert trained
    assert all(key.startswith("action_head.") for key in trained)
    assert all(not p.requires_grad for p in backend.core.parameters())

    if isinstance(backend.code_head, CodeTokenHead):
        backend = build(head, freeze_backbone=True, train_vocabulary="code_rows").train()
        total_loss(backend, batch, ACTIONS).loss.backward()
        assert all(key.startswith("action_head.") for key in gradients(backend))
        total_loss(backend, batch, MULTITASK).loss.backward()
        trained = gradients(backend)
        assert all(key.startswith(("action_head.", "core.code_rows.")) for key in trained)
        assert all(trained[key].any() for key, _ in backend.named_parameters() if key.startswith("core.code_rows."))

    backend = build(head, freeze_vision=True).train()
    total_loss(backend, batch, MULTITASK).loss.backward()
    trained = gradients(backend)
    vision = {id(p) for p in backend.core.vision_parameters()}
    learning = {key: p for key, p in backend.named_parameters() if p.requires_grad and id(p) not in vision}
    assert not any(id(p) in vision and p.grad is not None for p in backend.parameters())
    untouched = [key for key in learning if key not in trained]
    assert untouched == []
    assert sum(bool(grad.any()) for grad in trained.values()) > 0.9 * len(trained)


def test_inference_mode_leaves_nothing_that_breaks_training(name, build):
    backend = build("prefix_flow", code_conditioning=conditioning_of(name))
    batch = fake_batch(backend)
    with torch.inference_mode():
        backend.latent_from_batch(batch, mode=CODES)
        backend.predict_action_chunk(batch)
    total_loss(backend.train(), batch, MULTITASK).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(backend).values())


def test_a_few_steps_lower_every_loss(build):
    for mode in BackendMode:
        backend = build("mlp", code_source="teacher").train()
        batch = fake_batch(backend)
        optimizer = torch.optim.AdamW([p for p in backend.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(6):
            output = total_loss(backend, batch, mode)
            losses.append(output.loss.item())
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0], mode


def test_multitask_encodes_the_prefix_once(name, build):
    """Whatever the number of losses: one run of the core over the prompt, and short continuations over its cache."""
    for head, usual in (("prefix_flow", "none"), ("prefix_flow", "tokens"), ("mlp", "tokens"), ("flow", "soft")):
        conditioning = usual if usual == "none" else conditioning_of(name, usual)
        backend = build(head, code_conditioning=conditioning).train()
        batch = fake_batch(backend)
        prompt_len = backend._prompt(batch, for_prediction=True).tokens.ids.shape[1]
        lengths: list[int] = []
        hook = backend.core.register_forward_pre_hook(
            lambda _, args, seen=lengths: seen.append(args[0].ids.shape[1]),
        )
        total_loss(backend, batch, MULTITASK)
        hook.remove()
        assert sum(length >= prompt_len for length in lengths) == 1, (head, lengths)
        if conditioning == "none":
            assert len(lengths) == 1


@pytest.mark.parametrize("decoding", ["generate", "free"])
def test_code_conditioned_heads_and_decodings(name, build, decoding):
    """Only where codes are written as tokens they are decoded, and may then be none or without a distribution."""
    writes_tokens = isinstance(build().code_head, CodeTokenHead)
    if decoding == "free" and writes_tokens:
        with pytest.raises(ValueError, match=r"decoding: expected 'constrained'.*Next step"):
            build("mlp", decoding="free")
    else:
        backend = build("mlp", decoding=decoding)
        assert backend.predict_action_chunk(fake_batch(backend)).actions.shape == (3, 4, 2)
    if writes_tokens:
        with pytest.raises(ValueError, match=r"expected .*'constrained'.*Next step"):
            build("flow", code_conditioning="soft", decoding=decoding)
    elif get_recipe(name).predicts_vectors:
        with pytest.raises(ValueError, match="'vector'"):
            build("flow", code_conditioning="soft", decoding=decoding)
    else:
        backend = build("flow", code_conditioning="soft", decoding=decoding)
        assert backend.predict_action_chunk(fake_batch(backend)).actions.shape == (3, 4, 2)
