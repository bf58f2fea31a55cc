"""Linear layers by oneDNN = torch's own, and only where no gradient is wanted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hlrp_core.backbones import cpu_linear
from hlrp_core.backbones.cpu_linear import CPULinear, speed_up_linears, torch_kernels
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import SamplingOptions

pytestmark = pytest.mark.skipif(not cpu_linear._IS_AVAILABLE, reason="this torch has no oneDNN")


def build(bias: bool = True, *, frozen: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(192, 320, bias=bias).requires_grad_(not frozen)
    speed_up_linears(layer)
    assert type(layer) is CPULinear
    return layer


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each layer that torch's own kernel computed."""
    made, own = [], F.linear

    def note(*args):
        made.append(1)
        return own(*args)

    monkeypatch.setattr(F, "linear", note)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["plain", "batched", "transposed", "sliced", "broadcast"])
def test_equals_torchs_own(layout, bias, calls):
    layer = build(bias)
    x = {
        "plain": torch.randn(40, 192),
        "batched": torch.randn(2, 3, 9, 192),
        "transposed": torch.randn(192, 40).T,
        "sliced": torch.randn(40, 3, 192)[:, 1],
        "broadcast": torch.randn(1, 192).expand(40, -1),
    }[layout]
    for no_gradient in (torch.no_grad, torch.inference_mode):
        with no_gradient():
            got = layer(x)
            expected = x @ layer.weight.T + (layer.bias if bias else 0)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not calls


def test_a_bias_alone_can_learn(calls):
    layer = build()
    layer.weight.requires_grad_(False)
    assert layer(torch.randn(40, 192)).requires_grad
    assert calls


def test_a_frozen_layer_is_fast_in_training_too(calls):
    layer = build(frozen=True)
    assert not layer(torch.randn(40, 192)).requires_grad
    assert not calls


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_torchs_own(frozen, calls):
    layer = build(frozen=frozen)
    x = torch.randn(40, 192, requires_grad=frozen)
    layer(x).square().mean().backward()
    assert calls
    leaf = x if frozen else layer.weight
    expected_x = x.detach().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    F.linear(expected_x, weight, layer.bias.detach()).square().mean().backward()
    torch.testing.assert_close(leaf.grad, expected_x.grad if frozen else weight.grad)


@torch.no_grad()
def test_other_precisions_and_small_layers_are_torchs_own(calls):
    layer, x = build(), torch.randn(40, 192)
    assert layer(x[:1]).shape == (1, 320)
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(calls) == 3


def test_only_plain_layers_are_taken_and_the_state_stays():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    before = copy.deepcopy(module.state_dict())
    speed_up_linears(module)
    assert [type(part) for part in copy.deepcopy(module)] == [CPULinear, Special]
    assert module.state_dict().keys() == before.keys()


@torch.no_grad()
def test_a_backend_predicts_the_same(make_tiny_backend, monkeypatch):
    backend = make_tiny_backend("smol_plain", "prefix_flow")
    assert type(backend.core.lm_head) is CPULinear
    batch = fake_batch(backend)
    noise = torch.randn(3, 4, 2)
    monkeypatch.setattr(cpu_linear, "_LEAST_WORK", 0)  # a tiny model's layers are smaller than that
    fast = backend.predict_action_chunk(batch, sampling=SamplingOptions(noise=noise)).actions
    with torch_kernels():
        slow = backend.predict_action_chunk(batch, sampling=SamplingOptions(noise=noise)).actions
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
