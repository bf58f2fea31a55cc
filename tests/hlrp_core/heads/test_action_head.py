"""What holds for every action head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import (
    ACTION_HEADS,
    ActionContext,
    ActionHeadConfig,
    PrefixEncoding,
    build_action_head,
    hand_over_code_vectors,
)

SIZES = {"prefix_dim": 12, "codebook_size": 6, "code_seq_len": 3}

every_head = pytest.mark.parametrize("kind", list(ACTION_HEADS))


def sampling(batch_size: int = 5) -> SamplingOptions:
    noise = torch.randn(batch_size, 8, 2, generator=torch.Generator().manual_seed(4))
    return SamplingOptions(noise=noise)


# -- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_valid() -> None:
    config = ActionHeadConfig()
    assert (config.resolved_num_kv_heads, config.resolved_head_dim, config.resolved_mlp_dim) == (4, 64, 704)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: expected 1 or more, got 0"),
        ({"num_flow_steps": 0}, "num_flow_steps: expected 1 or more, got 0"),
        ({"state_dim": -1}, "state_dim: expected 0"),
        ({"mlp_dim": 0}, "mlp_dim: expected 1 or more, or None, got 0"),
        ({"code_vector_dim": 0}, "code_vector_dim: expected 1 or more, or None, got 0"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"hidden_dim": 30}, "hidden_dim: expected a multiple of num_heads=4, got 30"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"time_dim": 7}, "time_dim: expected an even number, got 7"),
        ({"code_conditioning": "hard"}, "code_conditioning: expected one of .*, got 'hard'"),
        ({"time_sampling": "normal"}, "time_sampling: expected one of .*, got 'normal'"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ActionHeadConfig(**settings)
    assert "Next step" in str(error.value)


def test_unknown_kind_offers_the_closest() -> None:
    with pytest.raises(ValueError, match=r"got 'prefixflow'.*Did you mean 'prefix_flow'"):
        build_action_head(ActionHeadConfig(kind="prefixflow"), **SIZES)


@pytest.mark.parametrize("kind", ["mlp", "flow"])
def test_heads_on_codes_refuse_to_do_without(kind: str) -> None:
    with pytest.raises(ValueError, match="expected 'tokens' or 'soft', got 'none'"):
        build_action_head(ActionHeadConfig(kind=kind), **SIZES)


def test_prefix_head_needs_a_prefix() -> None:
    with pytest.raises(ValueError, match="prefix_dim of action head 'prefix_flow'"):
        build_action_head(ActionHeadConfig(), prefix_dim=None, codebook_size=6, code_seq_len=3)


# -- inputs ----------------------------------------------------------------------------------------------------------


@every_head
def test_missing_inputs(kind, build, make_context, actions) -> None:
    head, context = build(kind), make_context()
    missing = ["state", "code_probs", *(["prefix"] if head.needs_prefix else [])]
    for name in missing:
        with pytest.raises(ValueError, match=rf"{name} of action head '{kind}': expected .*got None.*Next step"):
            head.per_sample_loss(replace(context, **{name: None}), actions, None)
        with pytest.raises(ValueError, match=f"{name} of action head"):
            head.predict(replace(context, **{name: None}), sampling())


@every_head
def test_wrong_sizes(kind, build, make_context, actions) -> None:
    head, context = build(kind), make_context()
    wrong = {
        "state": torch.zeros(5, 3),
        "code_probs": torch.zeros(5, 3, 7),
    }
    if head.needs_prefix:
        wrong["prefix"] = PrefixEncoding(torch.zeros(5, 7, 11), torch.ones(5, 7, dtype=torch.bool))
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name}.*expected shape .*, got .*Next step"):
            head.per_sample_loss(replace(context, **{name: value}), actions, None)
    with pytest.raises(ValueError, match=r"state.*\[5, 4\], got \[1, 4\]"):
        head.per_sample_loss(replace(context, state=torch.zeros(1, 4)), actions, None)
    with pytest.raises(ValueError, match=r"actions: expected shape \[5, 8, 2\], got \[5, 7, 2\]"):
        head.per_sample_loss(context, actions[:, :7], None)
    with pytest.raises(ValueError, match=r"actions: expected shape \[5, 8, 2\], got \[5, 8, 1\]"):
        head.per_sample_loss(context, actions[..., :1], None)
    with pytest.raises(ValueError, match=r"action_is_pad: expected shape \[5, 8\], got \[5, 2\]"):
        head.per_sample_loss(context, actions, torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"action_is_pad: expected bool, got torch.float32"):
        head.per_sample_loss(context, actions, torch.zeros(5, 8))


@every_head
def test_without_state(kind, build, make_context, actions) -> None:
    head = build(kind, state_dim=0)
    context = replace(make_context(), state=None)
    assert head.predict(context, sampling()).shape == (5, 8, 2)
    assert head.per_sample_loss(context, actions, None).isfinite().all()


@every_head
@pytest.mark.parametrize("is_fresh", [True, False])
def test_every_input_matters(kind, is_fresh, build, make_context) -> None:
    head, context = build(kind, is_fresh=is_fresh), make_context()
    other = make_context(seed=11)
    reference = head.predict(context, sampling())
    for name in ("state", "code_probs", *(["prefix"] if head.needs_prefix else [])):
        changed = head.predict(replace(context, **{name: getattr(other, name)}), sampling())
        assert (changed - reference).abs().amax(dim=(1, 2)).min() > 1e-6, name


# -- the loss --------------------------------------------------------------------------------------------------------


@every_head
def test_loss_of_a_row_is_its_own(kind, build, make_context, actions, is_pad, select, fixed_loss) -> None:
    head, context = build(kind), make_context()
    together = fixed_loss(head, context, actions, is_pad)
    assert together.shape == (5,)
    assert together.dtype == torch.float32
    for row in range(5):
        rows = slice(row, row + 1)
        alone = fixed_loss(head, select(context, rows), actions[rows], is_pad[rows], rows)
        torch.testing.assert_close(alone, together[rows], atol=1e-6, rtol=1e-5)


@every_head
def test_padded_steps_do_not_count(kind, build, make_context, actions, is_pad, fixed_loss) -> None:
    head, context = build(kind), make_context()
    loss = fixed_loss(head, context, actions, is_pad)
    for filler in (100.0, float("nan")):
        filled = actions.masked_fill(is_pad[..., None], filler)
        assert torch.equal(fixed_loss(head, context, filled, is_pad), loss)
    assert loss[-1] == 0  # every step is padded
    assert (loss[:-1] > 0).all()
    fixed_loss(head, context, actions.masked_fill(is_pad[..., None], float("nan")), is_pad).mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in head.parameters())


@every_head
def test_no_padding_is_padding_of_nothing(kind, build, make_context, actions, fixed_loss) -> None:
    head, context = build(kind), make_context()
    nothing = torch.zeros(5, 8, dtype=torch.bool)
    torch.testing.assert_close(
        fixed_loss(head, context, actions, None), fixed_loss(head, context, actions, nothing), atol=1e-6, rtol=1e-5
    )


@every_head
def test_every_parameter_learns(kind, build, make_context, actions) -> None:
    head, context = build(kind, is_fresh=True).train(), make_context()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    for _ in range(2):  # the flow time is silent at the start, so its embedding learns from the second step on
        optimizer.zero_grad()
        head.per_sample_loss(context, actions, None).mean().backward()
        optimizer.step()
    unchanged = [name for name, parameter in head.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == []


# -- prediction ------------------------------------------------------------------------------------------------------


@every_head
def test_prediction_of_a_row_is_its_own(kind, build, make_context, select) -> None:
    head, context, options = build(kind), make_context(), sampling()
    together = head.predict(context, options)
    for row in range(5):
        rows = slice(row, row + 1)
        alone = head.predict(select(context, rows), SamplingOptions(noise=options.noise[rows]))
        torch.testing.assert_close(alone, together[rows], atol=1e-6, rtol=1e-5)


@every_head
def test_dropout_acts_in_training_only(kind, build, make_context, actions, fixed_loss) -> None:
    head, context = build(kind, dropout=0.5), make_context()
    assert torch.equal(head.predict(context, sampling()), head.predict(context, sampling()))
    assert torch.equal(fixed_loss(head, context, actions, None), fixed_loss(head, context, actions, None))
    head.train()
    assert not torch.equal(fixed_loss(head, context, actions, None), fixed_loss(head, context, actions, None))


@every_head
def test_weights_travel(kind, build, make_context) -> None:
    head, other, context = build(kind, seed=0), build(kind, seed=1), make_context()
    assert not torch.equal(head.predict(context, sampling()), other.predict(context, sampling()))
    other.load_state_dict(head.state_dict())
    assert torch.equal(head.predict(context, sampling()), other.predict(context, sampling()))


@every_head
def test_actions_are_float32_in_any_precision(kind, build, make_context, actions, fixed_loss) -> None:
    head, context = build(kind), make_context()
    reference = head.predict(context, sampling())
    loss = fixed_loss(head, context, actions, None)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = head.predict(context, sampling())
        loss_under_autocast = fixed_loss(head, context, actions, None)
    low = head.to(torch.bfloat16)
    for result in (under_autocast, low.predict(context, sampling())):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, reference, atol=0.05, rtol=0.05)
    for result in (loss_under_autocast, fixed_loss(low, context, actions, None)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, loss, atol=0.05, rtol=0.05)


@every_head
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_prediction_records_nothing(kind, guard, build, make_context) -> None:
    head = build(kind)
    with guard():
        assert not head.predict(make_context(), sampling()).requires_grad


@every_head
def test_inputs_are_left_alone(kind, build, make_context, actions, is_pad, fixed_loss) -> None:
    head, context = build(kind), make_context()
    copy, labels = make_context(), actions.clone()
    fixed_loss(head, context, actions, is_pad)
    head.predict(context, sampling())
    assert torch.equal(actions, labels)
    assert torch.equal(context.state, copy.state)
    assert torch.equal(context.code_probs, copy.code_probs)
    assert torch.equal(context.prefix.hidden, copy.prefix.hidden)


# -- learning --------------------------------------------------------------------------------------------------------

MODES = torch.tensor([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])  # on a circle; their median is (-0.5, 0)


def toy_context(codes: torch.Tensor) -> ActionContext:
    """One code, as one-hot and as a prefix of a single token."""
    one_hot = nn.functional.one_hot(codes, 3).float()
    prefix = PrefixEncoding(one_hot[:, None], torch.ones(len(codes), 1, dtype=torch.bool))
    return ActionContext(code_probs=one_hot[:, None], prefix=prefix)


def train_on_toy(kind: str, *, is_ambiguous: bool) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """First and last loss, 300 predicted actions, and the modes that belong to their codes."""
    torch.manual_seed(0)
    settings = {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "time_dim": 32, "num_noise_draws": 4}
    conditioning = "none" if kind == "prefix_flow" else "tokens"
    if kind == "laq":
        settings["code_vector_dim"] = 2
    config = ActionHeadConfig(kind=kind, chunk_size=2, action_dim=2, code_conditioning=conditioning, **settings)
    head = build_action_head(config, prefix_dim=3, codebook_size=3, code_seq_len=1)
    hand_over_code_vectors(head, torch.randn(1, 3, 2) if kind == "laq" else None)
    num_steps = 250
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    losses = []
    for _ in range(num_steps):
        codes = torch.arange(48) % 3
        targets = torch.randint(0, 3, (48,)) if is_ambiguous else codes
        actions = MODES[targets][:, None].expand(-1, 2, -1)
        losses.append(head.per_sample_loss(toy_context(codes), actions, None).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        schedule.step()
    head.eval()
    codes = torch.arange(300) % 3
    with torch.no_grad():
        predicted = head.predict(toy_context(codes), SamplingOptions())
    first, last = (torch.stack(part).mean().item() for part in (losses[:5], losses[-20:]))
    return first, last, predicted, MODES[codes][:, None].expand(-1, 2, -1)


@every_head
def test_learns_what_the_code_says(kind) -> None:
    first, last, predicted, targets = train_on_toy(kind, is_ambiguous=False)
    assert last < 0.2 * first
    assert (predicted - targets).norm(dim=-1).mean() < 0.15


@every_head
def test_flow_finds_the_modes_and_regression_their_median(kind) -> None:
    _, _, predicted, _ = train_on_toy(kind, is_ambiguous=True)
    distances = torch.cdist(predicted.reshape(-1, 2), MODES)
    nearest, mode = distances.min(dim=-1)
    if kind in ("mlp", "laq"):
        torch.testing.assert_close(predicted[:3, 0], torch.tensor([-0.5, 0.0]).expand(3, 2), atol=0.2, rtol=0)
        assert nearest.min() > 0.5
    else:
        assert nearest.mean() < 0.25
        assert mode.bincount(minlength=3).min() > 100  # of 600: none of the three is forgotten
