"""What every policy type promises LeRobot. A new type is tested by being registered."""

from __future__ import annotations

import copy

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config

import lerobot_policy_hlrp  # noqa: F401
from hlrp_core.heads import ACTION_HEADS

POLICY_TYPES = sorted(name for name in PreTrainedConfig.get_known_choices() if name.startswith("hlrp_"))
HEADS = tuple(ACTION_HEADS)
CODES = [[1, 2, 3, 4], [0, 7, 0, 7], [5, 5, 6, 6]]


def prompt_variants() -> list[tuple[str, str, str]]:
    return [(t, *variant) for t in POLICY_TYPES for variant in PreTrainedConfig.get_choice_class(t).backends]


@pytest.fixture(params=POLICY_TYPES)
def policy_type(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_equal_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_is_found_by_name_and_constructible_by_default(policy_type):
    config = make_policy_config(policy_type)
    policy_class = get_policy_class(policy_type)
    assert policy_class.name == config.type == policy_type
    assert policy_class.config_class is type(config)
    assert config.push_to_hub is False


@pytest.mark.parametrize(("policy_type", "prompting", "code_head"), prompt_variants())
def test_learns_codes(policy_type, prompting, code_head, make_tiny_policy, make_lerobot_batch, listed_labels):
    policy = make_tiny_policy(
        policy_type, "codes", listed_labels(CODES), prompting=prompting, code_head=code_head
    ).train()
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    losses = []
    for _ in range(4):
        loss, metrics = policy(make_lerobot_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    of_vectors = {"vector_loss", "constant_vector_loss"} if code_head == "vector" else set()
    assert set(metrics) == {"codes_loss", "code_accuracy", "constant_accuracy", *of_vectors}
    assert all(type(value) is float for value in metrics.values())
    latent = policy.predict_codes(make_lerobot_batch())
    if code_head == "vector":
        assert latent.vector.shape == (3, 4, 1)
        assert latent.tokens is None
    else:
        assert latent.tokens.shape == (3, 4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mode", ["actions", "multitask"])
def test_learns_and_predicts_actions(policy_type, mode, head, make_tiny_policy, make_lerobot_batch, listed_labels):
    policy = make_tiny_policy(policy_type, mode, listed_labels(CODES), action_head=head).train()
    batch = make_lerobot_batch()
    before = copy.deepcopy(batch)
    loss, metrics = policy(batch)
    loss.backward()
    assert_equal_tensors(batch, before)  # not mutated
    assert "actions_loss" in metrics
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.backend.action_head.parameters())

    per_sample, _ = policy(batch, reduction="none")
    assert per_sample.shape == (3,)
    assert per_sample.requires_grad

    actions = policy.predict_action_chunk(batch)
    assert actions.shape == (3, 4, 2)
    assert actions.dtype == torch.float32
    assert not actions.requires_grad
    assert policy.training  # left as it was
    assert_equal_tensors(batch, before)


def test_runs_n_action_steps_of_a_chunk(policy_type, make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(policy_type, "actions").eval()
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    taken = [policy.select_action(batch, noise=noise) for _ in range(3)]
    assert torch.equal(torch.stack(taken, dim=1), chunk[:, :3])
    other = policy.select_action(make_lerobot_batch(seed=1), noise=noise)  # the queue is empty: a new chunk
    assert not torch.equal(other, chunk[:, 0])
    policy.reset()
    assert torch.equal(policy.select_action(batch, noise=noise), chunk[:, 0])


def test_predictions_under_inference_mode_do_not_break_training(
    policy_type, make_tiny_policy, make_lerobot_batch, listed_labels
):
    policy = make_tiny_policy(policy_type, "multitask", listed_labels(CODES), code_conditioning="tokens").eval()
    with torch.inference_mode():
        policy.select_action(make_lerobot_batch())
        policy.predict_codes(make_lerobot_batch())
    policy.reset()
    policy.train()
    loss, _ = policy(make_lerobot_batch())
    loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_actions_are_float32_in_any_precision(policy_type, autocast, make_tiny_policy, make_lerobot_batch):
    policy = make_tiny_policy(policy_type, "actions", dtype="bfloat16").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert policy.select_action(make_lerobot_batch()).dtype == torch.float32


@pytest.mark.parametrize("mode", ["codes", "actions", "multitask"])
def test_later_frames_never_reach_the_student(policy_type, mode, make_tiny_policy, make_lerobot_batch, listed_labels):
    policy = make_tiny_policy(policy_type, mode, listed_labels(CODES)).eval()
    one, other = make_lerobot_batch(num_frames=2), make_lerobot_batch(num_frames=2)
    for key in ("observation.images.top", "observation.state"):
        other[key][:, 1] = torch.rand_like(other[key][:, 1])
    results = []
    for batch in (one, other):
        torch.manual_seed(0)
        results.append((policy(batch)[0], policy.predict_codes(batch).logits))
        assert policy.reader.read_training(batch).frames.shape[1] == 1
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mode", ["codes", "multitask"])
def test_saves_and_loads_bit_exactly(policy_type, mode, tmp_path, make_tiny_policy, make_lerobot_batch, listed_labels):
    policy = make_tiny_policy(policy_type, mode, listed_labels(CODES)).eval()
    policy.save_pretrained(tmp_path / "policy")
    loaded = get_policy_class(policy_type).from_pretrained(tmp_path / "policy")
    assert not loaded.training
    assert_equal_tensors(policy.state_dict(), loaded.state_dict())
    batch, noise = make_lerobot_batch(), torch.randn(3, 4, 2)
    assert torch.equal(policy.predict_codes(batch).logits, loaded.predict_codes(batch).logits)
    if mode == "multitask":
        assert torch.equal(policy.select_action(batch, noise=noise), loaded.select_action(batch, noise=noise))
    loaded.reader.labels = policy.reader.labels
    losses = []
    for each in (policy, loaded):
        torch.manual_seed(0)
        losses.append(each(batch)[0])
    assert torch.equal(*losses)


def test_fully_sharded_training_finds_the_layers(policy_type, make_tiny_policy):
    for policy in (make_tiny_policy(policy_type, "codes"), make_tiny_policy(policy_type, "actions")):
        names = {type(module).__name__ for module in policy.modules()}
        assert len(policy._no_split_modules) >= 2
        assert set(policy._no_split_modules) <= names
    assert "ExpertLayer" in policy._no_split_modules


def test_a_gathered_state_dict_saves_the_same_weights(policy_type, tmp_path, make_tiny_policy):
    policy = make_tiny_policy(policy_type, "actions")
    policy.save_pretrained(tmp_path / "own")
    gathered = {name: tensor.clone() for name, tensor in policy.state_dict().items()}  # shared tensors twice
    policy.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    for name in ("model.safetensors", "config.json", "hlrp.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "gathered" / name).read_bytes()
