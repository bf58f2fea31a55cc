"""What every backend promises. A new backend is tested by being registered.

Shape legend: B batch, S code positions, K codebook size, C chunk length, A action width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hlrp_core import (
    ActionPolicyBackend,
    BackendMode,
    SamplingOptions,
    UnsupportedModeError,
    VLABackend,
    available_backends,
)
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import ActionBatch, FoundationBatch
from hlrp_core.heads import ACTION_HEADS
from hlrp_core.prompting.prompt import PromptConfig

CODES, ACTIONS, MULTITASK = BackendMode.CODES, BackendMode.ACTIONS, BackendMode.MULTITASK
HEADS = sorted(ACTION_HEADS)
ALL_HEADS = [None, *HEADS]


@pytest.fixture(params=available_backends())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(name: str, make_tiny_backend: Callable) -> Callable[..., ComposedBackend]:
    def build(head: str | None = None, **settings) -> ComposedBackend:
        return make_tiny_backend(name, head, **{"image_size": 48, **settings})

    return build


def total_loss(backend: ComposedBackend, batch: FoundationBatch, mode: BackendMode, seed: int = 0):
    """The loss with fixed flow noise."""
    torch.manual_seed(seed)
    return backend.loss_from_batch(batch, mode=mode)


def gradients(backend: ComposedBackend) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in backend.named_parameters() if p.grad is not None}


def snapshot(batch: ActionBatch) -> dict:
    return {f.name: copy.deepcopy(getattr(batch, f.name)) for f in fields(batch)}


def assert_unchanged(batch: ActionBatch, before: dict) -> None:
    for key, value in before.items():
        now = getattr(batch, key)
        assert torch.equal(now, value) if isinstance(value, Tensor) else now == value, key


def rows_of(batch: ActionBatch, rows: list[int]) -> ActionBatch:
    values = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("views", "meta")}
    picked = {key: value[rows] if isinstance(value, Tensor) else value for key, value in values.items()}
    picked["instructions"] = [batch.instructions[row] for row in rows]
    return ActionBatch(**picked)


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
    with pytest.raises(ValueError, match="kodes"):
        build().loss_from_batch(fake_batch(build()), mode="kodes")


def test_metrics_of_each_mode(build):
    backend = build("prefix_flow").train()
    batch = fake_batch(backend)
    codes = {"codes_loss", "code_accuracy", "constant_accuracy"}
    assert set(total_loss(backend, batch, CODES).metrics) == codes
    assert set(total_loss(backend, batch, ACTIONS).metrics) == {"actions_loss"}
    assert set(total_loss(backend, batch, MULTITASK).metrics) == {*codes, "actions_loss"}


@pytest.mark.parametrize("head", ALL_HEADS)
def test_shapes_of_predictions(build, head):
    backend = build(head)
    batch = fake_batch(backend)
    latent = backend.latent_from_batch(batch, mode=CODES)
    assert latent.tokens.shape == (3, 4)
    assert latent.tokens.dtype == torch.long
    assert latent.logits.shape == (3, 4, 8)
    assert torch.equal(latent.logits.argmax(-1), latent.tokens)
    if head is not None:
        output = backend.predict_action_chunk(batch)
        assert output.actions.shape == (3, 4, 2)
        assert output.actions.dtype == torch.float32
        assert output.actions.isfinite().all()
        assert (output.latent is not None) == backend.action_head.needs_codes


# -- the log-probability of given codes -------------------------------------------------------------------------------


def same_sample(batch: FoundationBatch, size: int) -> FoundationBatch:
    """The first sample, `size` times, without labels."""
    return FoundationBatch(batch.frames[[0] * size], [batch.instructions[0]] * size)


def test_the_probabilities_of_all_codes_sum_to_one(build):
    backend = build(codebook_size=2, code_seq_len=3)
    with torch.no_grad():
        for parameter in backend.code_head.parameters():
            parameter.mul_(3)  # far from even
        backend.core.lm_head.weight.mul_(3)
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)  # (8, 3)
    log_probs = backend.latent_log_prob(same_sample(fake_batch(backend), 8), every)
    assert log_probs.shape == (8,)
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert log_probs.exp().std() > 0.01


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_log_probabilities_are_those_that_codes_are_drawn_with(build, padding_side):
    backend = build(prompt=PromptConfig(padding_side=padding_side))
    batch = fake_batch(backend, batch_size=4)  # instructions of several lengths
    for temperature in (0.0, 1.0):
        sampling = SamplingOptions(temperature=temperature, generator=torch.Generator().manual_seed(3))
        drawn = backend.latent_from_batch(batch, mode=CODES, sampling=sampling)
        chosen = drawn.logits.log_softmax(-1).gather(2, drawn.tokens[..., None])
        log_probs = backend.latent_log_prob(batch, drawn.tokens)
        torch.testing.assert_close(log_probs, chosen.sum((1, 2)), rtol=0, atol=1e-4)


def test_log_probabilities_follow_their_gradient(build):
    """One step up the gradient makes the codes likelier; batch mates and labels say nothing."""
    backend = build().train()
    batch = fake_batch(backend)
    codes = batch.target_codes
    before = backend.latent_log_prob(batch, codes)
    (-before.sum()).backward()
    assert backend.core.training
    optimizer = torch.optim.SGD([p for p in backend.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    with torch.no_grad():
        after = backend.latent_log_prob(batch, codes)
        assert not after.requires_grad
        assert after.sum() > before.sum()
        bare = FoundationBatch(batch.frames[[2, 0]], [batch.instructions[i] for i in (2, 0)])
        torch.testing.assert_close(backend.latent_log_prob(bare, codes[[2, 0]]), after[[2, 0]], rtol=0, atol=1e-4)


def test_codes_without_a_probability_are_errors(build):
    backend = build()
    batch = fake_batch(backend)
    for codes, text in (
        (torch.full((3, 4), -1), r"codes: expected codes in \[0, 8\), got -1"),  # what free decoding did not parse
        (torch.zeros(3, 5, dtype=torch.long), r"codes: expected long \[B, 4\].*\(3, 5\)"),
        (torch.zeros(2, 4, dtype=torch.long), r"B=3, got int64 \(2, 4\)"),
        (torch.zeros(3, 4), r"got float32 \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=text):
            backend.latent_log_prob(batch, codes)


# -- labels that are missing or wrong ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("head", HEADS)
def test_nan_fillers_of_unlabelled_samples_do_no_harm(build, head):
    backend = build(head).train()
    batch = fake_batch(backend)
    valid = torch.tensor([True, False, True])
    actions, state = batch.actions.clone(), batch.state
    actions[1] = float("nan")
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
def test_a_batch_with_none_of_a_kind_gives_that_loss_weight_zero(build, head):
    backend = build(head).train()
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


# -- only frame t reaches the student ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_other_frames_change_nothing(build, head):
    backend = build(head).train()
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
            assert all(torch.equal(latent.logits, latents[0].logits) for latent in latents)
    if head is not None:
        noise = SamplingOptions(noise=torch.randn(3, 4, 2))
        chunks = [backend.predict_action_chunk(each, sampling=noise).actions for each in (batch, other, alone)]
        assert all(torch.equal(chunk, chunks[0]) for chunk in chunks)


def test_frame_t_and_the_words_do_change_the_prediction(build):
    backend = build()
    batch = fake_batch(backend)
    logits = backend.latent_from_batch(batch, mode=CODES).logits
    seen = backend.latent_from_batch(replace(batch, frames=255 - batch.frames), mode=CODES).logits
    heard = backend.latent_from_batch(replace(batch, instructions=["stop", "stop", "stop"]), mode=CODES).logits
    assert (seen - logits).abs().amax((1, 2)).min() > 0
    assert (heard - logits).abs().amax((1, 2)).min() > 0


def test_labels_change_no_prediction(build):
    backend = build("prefix_flow", code_conditioning="tokens")
    batch = fake_batch(backend)
    noise = SamplingOptions(noise=torch.randn(3, 4, 2))
    bare = ActionBatch(batch.frames, batch.instructions, state=batch.state)
    assert torch.equal(
        backend.predict_action_chunk(batch, sampling=noise).actions,
        backend.predict_action_chunk(bare, sampling=noise).actions,
    )
    assert torch.equal(
        backend.latent_from_batch(batch, mode=CODES).logits, backend.latent_from_batch(bare, mode=CODES).logits
    )


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_order_and_size_of_the_batch_change_nothing(build, head):
    backend = build(head).eval()
    batch = fake_batch(backend, batch_size=4)
    noise = torch.randn(4, 4, 2)
    order = [3, 1, 0, 2]
    codes = backend.latent_from_batch(batch, mode=CODES).logits
    per_sample = total_loss(backend, batch, CODES).per_sample
    for rows in (order, [2], [0, 3]):
        part = rows_of(batch, rows)
        torch.testing.assert_close(backend.latent_from_batch(part, mode=CODES).logits, codes[rows], rtol=0, atol=1e-4)
        torch.testing.assert_close(total_loss(backend, part, CODES).per_sample, per_sample[rows], rtol=0, atol=1e-4)
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
            assert not latent.logits.requires_grad
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
    reordered = {name: views[name] for name in ("side", "wrist")}
    assert torch.equal(one, backend.predict_action_chunk(replace(batch, views=reordered), sampling=noise).actions)
    changed = {**views, "wrist": 255 - views["wrist"]}
    assert not torch.equal(one, backend.predict_action_chunk(replace(batch, views=changed), sampling=noise).actions)
    small = {"wrist": views["wrist"][:, :24, :24]}
    with pytest.raises(ValueError, match="views"):
        backend.predict_action_chunk(replace(batch, views=small))


# -- life of a backend ------------------------------------------------------------------------------------------------


def test_setup_may_be_called_again(build):
    backend = build()
    batch = fake_batch(backend)
    before = backend.latent_from_batch(batch, mode=CODES).logits
    names = list(backend.state_dict())
    backend.setup(device=torch.device("cpu"))
    assert list(backend.state_dict()) == names
    assert torch.equal(backend.latent_from_batch(batch, mode=CODES).logits, before)


def test_a_deep_copy_is_independent(build):
    backend = build()
    twin = copy.deepcopy(backend)
    batch = fake_batch(backend)
    before = backend.latent_from_batch(batch, mode=CODES).logits
    assert torch.equal(twin.latent_from_batch(batch, mode=CODES).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(backend.latent_from_batch(batch, mode=CODES).logits, before)
    assert not torch.equal(twin.latent_from_batch(batch, mode=CODES).logits, before)


@pytest.mark.parametrize("head", HEADS)
def test_frozen_parts_get_no_gradient_and_learning_parts_do(build, head):
    backend = build(head, freeze_backbone=True).train()
    batch = fake_batch(backend)
    total_loss(backend, batch, ACTIONS).loss.backward()
    trained = set(gradients(backend))
    assert trained
    assert all(key.startswith("action_head.") for key in trained)
    assert all(not p.requires_grad for p in backend.core.parameters())

    backend = build(head, freeze_vision=True).train()
    total_loss(backend, batch, MULTITASK).loss.backward()
    trained = gradients(backend)
    vision = {id(p) for p in backend.core.vision_parameters()}
    learning = {key: p for key, p in backend.named_parameters() if p.requires_grad and id(p) not in vision}
    assert not any(id(p) in vision and p.grad is not None for p in backend.parameters())
    untouched = [key for key in learning if key not in trained]
    assert untouched == []
    assert sum(bool(grad.any()) for grad in trained.values()) > 0.9 * len(trained)


def test_inference_mode_leaves_nothing_that_breaks_training(build):
    backend = build("prefix_flow", code_conditioning="tokens")
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


def test_multitask_encodes_the_prefix_once(build):
    """Whatever the number of losses: one run of the core over the prompt, and short continuations over its cache."""
    for head, conditioning in (("prefix_flow", "none"), ("prefix_flow", "tokens"), ("mlp", "tokens"), ("flow", "soft")):
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
def test_code_conditioned_heads_and_decodings(build, decoding):
    if decoding == "free":
        with pytest.raises(ValueError, match="constrained"):
            build("mlp", decoding="free")
    else:
        backend = build("mlp", decoding="generate")
        assert backend.predict_action_chunk(fake_batch(backend)).actions.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="constrained"):
        build("flow", code_conditioning="soft", decoding=decoding)
