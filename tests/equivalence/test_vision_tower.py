"""The vision tower with kept tables and batched attention = transformers' own, outputs and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from hlrp_core.backbones.qwen3_vl_vision import optimize_vision_tower

GRIDS = {
    "one": [(1, 8, 8)],
    "equal": [(1, 4, 6)] * 3,
    "unequal": [(1, 4, 4), (1, 8, 2), (1, 4, 4)],
    "same length, other shape": [(1, 4, 4), (1, 2, 8)],
    "frames": [(2, 4, 4), (2, 4, 4)],
}


def build_towers(make_tiny_backend, dtype=torch.float32, attention: str = "sdpa"):
    config = copy.deepcopy(make_tiny_backend().core.model.config.vision_config)
    config._attn_implementation = attention
    torch.manual_seed(3)
    theirs = Qwen3VLVisionModel(config)
    for parameter in theirs.parameters():  # biases and norms off their initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = copy.deepcopy(theirs)
    optimize_vision_tower(ours)
    return theirs.to(dtype), ours.to(dtype)


def patches(tower: Qwen3VLVisionModel, grids, seed: int = 0) -> Tensor:
    config = tower.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), width, generator=rng).to(tower.dtype)


def run(tower: Qwen3VLVisionModel, pixels: Tensor, grids) -> list[Tensor]:
    output = tower(pixels, grid_thw=torch.tensor(grids))
    return [output.pooler_output, output.last_hidden_state, *output.deepstack_features]


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest of the expected values."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GRIDS)
def test_outputs_and_gradients(name, attention, make_tiny_backend):
    theirs, ours = build_towers(make_tiny_backend, attention=attention)
    pixels, grids = patches(theirs, GRIDS[name]), GRIDS[name]
    expected, got = run(theirs, pixels, grids), run(ours, pixels, grids)
    for one, other in zip(expected, got, strict=True):
        assert_close(other, one)
    for outputs in (expected, got):
        sum((output * torch.linspace(-1, 1, output.shape[-1])).square().mean() for output in outputs).backward()
    for (key, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None, key
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()) + 1e-8, msg=key)


@pytest.mark.parametrize("name", ["equal", "unequal"])
def test_bfloat16(name, make_tiny_backend):
    theirs, ours = build_towers(make_tiny_backend, torch.bfloat16)
    pixels = patches(theirs, GRIDS[name])
    for one, other in zip(run(theirs, pixels, GRIDS[name]), run(ours, pixels, GRIDS[name]), strict=True):
        assert other.dtype == torch.bfloat16
        torch.testing.assert_close(other.float(), one.float(), rtol=0.05, atol=0.05)
    # a table made in one precision must not serve another
    torch.testing.assert_close(
        run(ours.float(), pixels.float(), GRIDS[name])[0],
        run(theirs.float(), pixels.float(), GRIDS[name])[0],
        rtol=1e-4,
        atol=1e-4,
    )


def test_tables_follow_the_position_weights_as_they_learn(make_tiny_backend):
    theirs, ours = build_towers(make_tiny_backend)
    pixels, grids = patches(theirs, GRIDS["equal"]), GRIDS["equal"]
    run(ours, pixels, grids)
    for tower in (theirs, ours):
        tower.pos_embed.weight.data += 1.0
    assert_close(run(ours, pixels, grids)[0], run(theirs, pixels, grids)[0])


def test_deepcopy_and_state_dict(make_tiny_backend):
    theirs, ours = build_towers(make_tiny_backend)
    pixels, grids = patches(theirs, GRIDS["unequal"]), GRIDS["unequal"]
    run(ours, pixels, grids)
    twin = copy.deepcopy(ours)
    assert twin.state_dict().keys() == theirs.state_dict().keys()
    twin.pos_embed.weight.data += 1.0
    assert not torch.equal(run(twin, pixels, grids)[0], run(ours, pixels, grids)[0])
    assert_close(run(ours, pixels, grids)[0], run(theirs, pixels, grids)[0])


def test_a_table_made_under_inference_mode_serves_training(make_tiny_backend):
    theirs, ours = build_towers(make_tiny_backend)
    pixels, grids = patches(theirs, GRIDS["equal"]), GRIDS["equal"]
    with torch.inference_mode():
        run(ours, pixels, grids)
    for tower in (ours, theirs):
        run(tower, pixels, grids)[0].square().mean().backward()
    torch.testing.assert_close(ours.pos_embed.weight.grad, theirs.pos_embed.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["equal", "same length, other shape", "frames"])
def test_nothing_waits_for_the_device_once_the_tables_are_there(name, make_tiny_backend):
    """On a GPU each number that the host reads from a tensor stops it until all work before is done."""
    _, ours = build_towers(make_tiny_backend)
    pixels, grids = patches(ours, GRIDS[name]), GRIDS[name]
    expected = run(ours, pixels, grids)
    with NumbersRead() as read:
        got = run(ours, pixels, grids)
    assert read.count == 0
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    with NumbersRead() as read:
        assert bool(got[0].isfinite().all())
    assert read.count == 1


class NumbersRead(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, such as by `bool` or `item`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", GRIDS)
def test_tables_that_are_put_together_are_those_of_transformers(name, make_tiny_backend):
    """Bit for bit, computed and kept."""
    theirs, ours = build_towers(make_tiny_backend)
    grids = torch.tensor(GRIDS[name])
    for _ in range(2):
        assert torch.equal(ours.rot_pos_emb(grids), theirs.rot_pos_emb(grids))
        assert_close(ours.fast_pos_embed_interpolate(grids), theirs.fast_pos_embed_interpolate(grids))
    alone = [ours.fast_pos_embed_interpolate(grid[None]) for grid in grids]
    assert torch.equal(ours.fast_pos_embed_interpolate(grids), torch.cat(alone))


def test_one_grid_has_one_table_whatever_the_batch(make_tiny_backend, monkeypatch):
    _, ours = build_towers(make_tiny_backend)
    computed = []
    table_of = type(ours)._interpolation_table
    monkeypatch.setattr(
        type(ours), "_interpolation_table", lambda self, grid: computed.append(grid) or table_of(self, grid)
    )
    small, wide = (1, 4, 4), (1, 4, 6)
    for grids in ([small], [small] * 2, [small] * 5, [wide, small], [small, wide, small], [wide] * 3):
        run(ours, patches(ours, grids), grids)
    assert computed == [small, wide]
    assert len(ours._rotary_tables) == len(ours._corner_tables) == 2


def test_the_kept_tables_are_bounded(make_tiny_backend):
    _, ours = build_towers(make_tiny_backend)
    many = [(1, 2, 2 * width) for width in range(1, 80)]
    for grids in [*([grid] for grid in many), many]:
        tables = ours.rot_pos_emb(torch.tensor(grids))
        positions = ours.fast_pos_embed_interpolate(torch.tensor(grids))
        assert len(tables) == len(positions) == sum(height * width for _, height, width in grids)
    assert len(ours._rotary_tables) <= 64
    assert len(ours._corner_tables) <= 64
