"""Positions from layouts alone = transformers' own, for any padding and any number of images."""

from __future__ import annotations

import pytest
import torch

from hlrp_core.backbones.token_batch import EncodedPrompt, TokenBatch

LAYOUTS = {
    "one": [[(1, 8, 8)]],
    "mixed grids": [[(1, 8, 8)], [(1, 4, 12)], [(1, 2, 2)]],
    "two images": [[(1, 8, 4), (1, 4, 4)], [(1, 2, 2), (1, 2, 6)]],
    "text alone": [[], []],
}
TEXT = (3, 7, 2, 11, 5)  # lengths of the stretches of text, taken in turn


@pytest.fixture(scope="module")
def core(make_tiny_backend):
    return make_tiny_backend().core


def build_prompt(core, layouts, row: int) -> EncodedPrompt:
    ids: list[int] = [10] * TEXT[row % len(TEXT)]
    for number, layout in enumerate(layouts):
        ids += core.image_ids(layout) + [11] * TEXT[(row + number + 1) % len(TEXT)]
    ids = torch.tensor(ids)
    return EncodedPrompt(ids, core.build_positions(ids, layouts))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_equal_get_rope_index(name, side, core):
    rows = LAYOUTS[name]
    prompts = [build_prompt(core, layouts, row) for row, layouts in enumerate(rows)]
    batch = TokenBatch.pad(prompts, pad_id=0, side=side, device=torch.device("cpu"))
    grids = [layout for layouts in rows for layout in layouts]
    expected, deltas = core.model.model.get_rope_index(
        batch.ids,
        mm_token_type_ids=(batch.ids == core.model.config.image_token_id).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=batch.valid_mask.long(),
    )
    mask = batch.valid_mask[None].expand_as(batch.positions)
    assert torch.equal(batch.positions[mask], expected[mask])
    length = batch.valid_mask.sum(1)
    assert torch.equal(batch.next_position, length + deltas.flatten())


def test_continuations_go_on_behind_the_largest_position(core):
    prompts = [build_prompt(core, layouts, row) for row, layouts in enumerate(LAYOUTS["mixed grids"])]
    for side in ("left", "right"):
        batch = TokenBatch.pad(prompts, pad_id=0, side=side, device=torch.device("cpu"))
        more = torch.tensor([[1, 2]] * 3)
        grown, tail = batch.append(more), batch.continuation(more)
        for row, prompt in enumerate(prompts):
            ids = grown.ids[row][grown.valid_mask[row]]
            assert ids.tolist() == [*prompt.ids.tolist(), 1, 2]
            positions = grown.positions[:, row][:, grown.valid_mask[row]]
            last = int(prompt.positions.max())
            assert positions[:, -2:].tolist() == [[last + 1, last + 2]] * 3
            assert tail.positions[:, row].tolist() == [[last + 1, last + 2]] * 3
        assert torch.equal(grown.next_position, tail.next_position)
        # padding stays at its side, in one piece
        edges = (grown.valid_mask[:, 1:] != grown.valid_mask[:, :-1]).sum(1)
        assert (edges <= 1).all()
