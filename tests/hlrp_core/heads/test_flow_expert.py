"""The expert against the same network written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.expert import FlowExpert


def build_expert(**settings) -> FlowExpert:
    torch.manual_seed(0)
    sizes = {"chunk_size": 6, "action_dim": 3, "hidden_dim": 32, "num_layers": 3, "num_heads": 4, "time_dim": 16}
    expert = FlowExpert(ActionHeadConfig(**{**sizes, **settings}))
    with torch.no_grad():  # away from the start, where much is close to zero
        for parameter in expert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return expert


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def slow_velocity(expert: FlowExpert, x_t: Tensor, time: Tensor, tokens: Tensor, is_hidden: Tensor) -> Tensor:
    """Sample by sample, layer by layer and head by head, everything projected where it is used.

    `is_hidden` `[B, M + C]` is True where nothing attends.
    """
    config = expert.config
    H, d, G = config.hidden_dim, config.resolved_head_dim, config.resolved_num_kv_heads
    kv_weight = expert.memory_keys_values.weight.view(config.num_layers, 2, G, d, H)
    velocities = []
    for sample, t, memory, hidden in zip(x_t, time, unit(tokens), is_hidden, strict=True):
        vectors = expert.modulation_out(expert.time_embedding(t[None]))[0].view(-1, H)
        x = expert.action_in(sample) + expert.action_positions
        for n, layer in enumerate(expert.layers):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors[6 * n : 6 * n + 6]
            qkv = layer.qkv(unit(x) * scale + shift)
            heads = []
            for q in range(config.num_heads):
                g = q // (config.num_heads // G)
                key_at, value_at = config.num_heads + g, config.num_heads + G + g
                queries = unit(qkv[:, q * d : (q + 1) * d])
                keys = torch.cat([memory @ kv_weight[n, 0, g].T, qkv[:, key_at * d : (key_at + 1) * d]])
                values = torch.cat([memory @ kv_weight[n, 1, g].T, qkv[:, value_at * d : (value_at + 1) * d]])
                logits = 3.0 / math.sqrt(d) * queries @ unit(keys).T
                heads.append(logits.masked_fill(hidden, -math.inf).softmax(-1) @ values)
            x = x + gate * layer.attention_out(torch.cat(heads, dim=-1))
            before, after = layer.mlp.gate_and_up(unit(x) * mlp_scale + mlp_shift).chunk(2, dim=-1)
            x = x + mlp_gate * layer.mlp.down(F.silu(before) * after)
        shift, scale = vectors[-2:]
        velocities.append(expert.action_out(unit(x) * scale + shift))
    return torch.stack(velocities)


@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "head_dim": 12, "mlp_dim": 40}])
def test_equals_the_slow_network(settings) -> None:
    expert = build_expert(**settings)
    x_t, time, tokens = torch.randn(4, 6, 3), torch.rand(4), torch.randn(4, 9, 32) * 5
    valid_mask = torch.rand(4, 9) > 0.3
    is_pad = torch.arange(6) >= torch.tensor([6, 5, 2, 1])[:, None]
    tokens_slow = tokens.clone().requires_grad_()
    slow = slow_velocity(expert, x_t, time, tokens_slow, torch.cat([~valid_mask, is_pad], dim=1))
    tokens_fast = tokens.clone().requires_grad_()
    memory = expert.remember(tokens_fast, valid_mask).hide_steps(is_pad)
    fast = expert(x_t, expert.modulation(time), memory)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    slow.square().sum().backward()
    fast.square().sum().backward()
    torch.testing.assert_close(tokens_fast.grad, tokens_slow.grad, atol=1e-5, rtol=1e-4)


def test_repeated_memory_serves_each_row_several_times() -> None:
    expert = build_expert()
    tokens, valid_mask = torch.randn(2, 5, 32), torch.rand(2, 5) > 0.3
    x_t, time = torch.randn(6, 6, 3), torch.rand(6)
    once = expert.remember(tokens, valid_mask).repeat(3)
    written_out = expert.remember(tokens.repeat_interleave(3, dim=0), valid_mask.repeat_interleave(3, dim=0))
    modulation = expert.modulation(time)
    torch.testing.assert_close(expert(x_t, modulation, once), expert(x_t, modulation, written_out))


def test_starts_close_to_zero_but_not_at_it() -> None:
    torch.manual_seed(0)
    expert = FlowExpert(ActionHeadConfig(hidden_dim=128, num_layers=8))
    memory = expert.remember(torch.randn(4, 9, 128), torch.ones(4, 9, dtype=torch.bool))
    velocity = expert(torch.randn(4, 8, 2), expert.modulation(torch.rand(4)), memory)
    assert 0.005 < velocity.std() < 0.3


def test_time_matters_once_trained() -> None:
    expert = build_expert()
    memory = expert.remember(torch.randn(1, 9, 32), torch.ones(1, 9, dtype=torch.bool))
    x_t = torch.randn(1, 6, 3)
    early, late = (expert(x_t, expert.modulation(torch.tensor([t])), memory) for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_embedding_keeps_float32_resolution(dtype) -> None:
    """0.999 and 1.0 are the same number in bfloat16, but not the same time."""
    expert = build_expert(time_dim=128).to(dtype)
    near, at_noise = expert.modulation(torch.tensor([0.999, 1.0]))
    assert not torch.equal(near, at_noise)


def test_nothing_to_attend_to_is_not_nan() -> None:
    expert = build_expert()
    memory = expert.remember(torch.randn(1, 3, 32), torch.zeros(1, 3, dtype=torch.bool))
    memory = memory.hide_steps(torch.ones(1, 6, dtype=torch.bool))
    assert expert(torch.randn(1, 6, 3), expert.modulation(torch.rand(1)), memory).isfinite().all()
