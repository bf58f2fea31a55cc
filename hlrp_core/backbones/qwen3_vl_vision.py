"""Qwen3-VL's vision tower with its tables kept, its attention batched and its patches embedded by one product.

transformers computes rotary positions, position interpolation and attention image by image in Python loops. Here a
grid's tables are computed once, and the attention of images of one grid is one batched call. The weights, the state
dict and the results are those of transformers' class; the tests hold both equal.

Shape legend: N images, P patches of one image, G = N * P patches of a call, E vision width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionAttention,
    Qwen3VLVisionModel,
    Qwen3VLVisionPatchEmbed,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)
from transformers.utils.generic import is_flash_attention_requested


def optimize_vision_tower(visual: Qwen3VLVisionModel) -> None:
    """Give a loaded vision tower the faster parts of this module; its parameters stay its own."""
    # Swapping the class, rather than binding functions to the instance, survives deepcopy and keeps the state dict.
    visual.__class__ = CachedGridVisionModel
    visual._rotary_tables, visual._corner_tables = {}, {}  # type: ignore[attr-defined]
    visual.patch_embed.__class__ = LinearPatchEmbed
    for block in visual.blocks:
        block.attn.__class__ = BatchedVisionAttention  # type: ignore[assignment]


class CachedGridVisionModel(Qwen3VLVisionModel):
    """Computes a grid's tables once per grid, precision and device."""

    _rotary_tables: dict[tuple, Tensor]  # by grid, device and precision
    _corner_tables: dict[tuple, tuple[Tensor, Tensor]]

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """As in transformers. With `grid_thw` `[N, 3]` on the CPU the host never waits for the device."""
        grid_thw = grid_thw.cpu()  # read below and in every block
        lengths = {height * width for _, height, width in grid_thw.tolist()}
        image_len = lengths.pop() if len(lengths) == 1 else None
        return super().forward(hidden_states, grid_thw, image_len=image_len, **kwargs)  # type: ignore[call-arg]

    def rot_pos_emb(self, grid_thw: Tensor) -> Tensor:
        """`[G, rotary width]`."""
        frequencies, tables = self.rotary_pos_emb.inv_freq, []
        for grid in map(tuple, grid_thw.tolist()):
            key = (grid, frequencies.device, frequencies.dtype)
            if key not in self._rotary_tables:
                with torch.no_grad():
                    table = super().rot_pos_emb(torch.tensor([grid]))
                _remember(self._rotary_tables, key, _serving_training(table))
            tables.append(self._rotary_tables[key])
        return torch.cat(tables)

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        """`[G, E]`: the learnt position table, bilinearly interpolated to the grids."""
        weight, tables = self.pos_embed.weight, []
        for grid in map(tuple, grid_thw.tolist()):
            key = (grid, weight.device, weight.dtype)
            if key not in self._corner_tables:
                indices, weights = self._interpolation_table(grid)
                corners = _serving_training(indices.to(weight.device)), _serving_training(weights.to(weight))
                _remember(self._corner_tables, key, corners)
            tables.append(self._corner_tables[key])
        indices, weights = (torch.cat(parts, 1) for parts in zip(*tables, strict=True))  # (4, G) each
        return (self.pos_embed(indices) * weights[:, :, None]).sum(0)  # (G, E)

    def _interpolation_table(self, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Corner rows `[4, patches]` of the position table and their weights, in the merger's block order."""
        time, height, width = grid
        side = self.num_grid_per_side
        rows, columns = torch.linspace(0, side - 1, height), torch.linspace(0, side - 1, width)
        row, column = rows.int(), columns.int()
        next_row, next_column = (row + 1).clip(max=side - 1), (column + 1).clip(max=side - 1)
        down, right = (rows - row)[:, None], (columns - column)[None]
        corners = [(row, column), (row, next_column), (next_row, column), (next_row, next_column)]
        indices = torch.stack([(r * side)[:, None] + c[None] for r, c in corners])  # (4, height, width)
        weights = torch.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])

        def in_block_order(table: Tensor) -> Tensor:
            merge = self.spatial_merge_size
            blocks = table.view(4, height // merge, merge, width // merge, merge).transpose(2, 3)
            return blocks.flatten(1).repeat(1, time)  # (4, time * height * width)

        return in_block_order(indices.long()), in_block_order(weights)


def _remember(tables: dict, key: tuple, table: Any) -> None:
    if len(tables) >= 64:  # data sets have few image sizes; this only bounds the odd one that has many
        tables.clear()
    tables[key] = table


def _serving_training(table: Tensor) -> Tensor:
    """A copy that was not made under inference mode: it must still serve a later training step."""
    with torch.inference_mode(False):
        return table.clone()


class LinearPatchEmbed(Qwen3VLVisionPatchEmbed):
    """A convolution whose kernel is the whole patch is a matrix product, and several times faster as one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[G, patch values]` -> `[G, E]`."""
        weight = self.proj.weight.flatten(1)  # (E, patch values)
        return F.linear(hidden_states.to(weight.dtype), weight, self.proj.bias)


class BatchedVisionAttention(Qwen3VLVisionAttention):
    """Attends within each image, all images of one length in a single call."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        rotary_pos_emb: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        image_len: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """`[G, E]` -> `[G, E]`.

        Args:
            cu_seqlens: `[N + 1]`, where images end.
            image_len: P where all images have the same, known without asking the device; else None.
        """
        is_flash = is_flash_attention_requested(self.config)
        if image_len is None or is_flash:
            ends = cu_seqlens.to(hidden_states.device) if is_flash else cu_seqlens
            return super().forward(
                hidden_states, ends, rotary_pos_emb, position_embeddings=position_embeddings, **kwargs
            )
        assert position_embeddings is not None
        num_patches = hidden_states.shape[0]
        query, key, value = self.qkv(hidden_states).view(num_patches, 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # type: ignore[arg-type]
            eager_attention_forward,
        )
        query, key, value = (
            x.view(-1, image_len, self.num_heads, x.shape[-1]).transpose(1, 2) for x in (query, key, value)
        )  # (N, heads, P, head width)
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            is_causal=False,
            **kwargs,
        )  # (N, P, heads, head width)
        return self.proj(output.reshape(num_patches, -1))
