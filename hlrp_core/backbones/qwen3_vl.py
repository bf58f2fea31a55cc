"""The Qwen3-VL family (Qwen3-VL, Cosmos-Reason2) on transformers' own classes.

Notable: positions have three axes (multimodal rope) and are computed once for each prompt layout, never taken from
`model.rope_deltas`, which is state left over from the last call; the vision tower keeps its per-grid tables
(`qwen3_vl_vision.py`).

Shape legend: B batch, L tokens, N images, W hidden width; a layout is the image's patch grid (t, h, w).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.qwen3_vl_vision import optimize_vision_tower
from hlrp_core.backbones.token_batch import ImageInputs, TokenBatch


class Qwen3VLCore(ModelCore):
    """Args as in `ModelCore`. `image_size`: an image is scaled to this many pixels squared, its aspect kept."""

    family = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
    model_types = ("qwen3_vl",)

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, image_size: int | None = None):
        super().__init__(model, processor)
        if image_size is not None:
            pixels = image_size**2
            processor.image_processor.size = {"shortest_edge": pixels, "longest_edge": pixels}  # type: ignore[attr-defined]
        optimize_vision_tower(model.model.visual)  # type: ignore[union-attr, arg-type]
        self._merge = model.config.vision_config.spatial_merge_size  # type: ignore[union-attr]
        self._image_token_id: int = model.config.image_token_id  # type: ignore[assignment]

    @property
    def hidden_dim(self) -> int:
        return self.model.config.text_config.hidden_size  # type: ignore[union-attr]

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]

    @property
    def image_token(self) -> str:
        return self.processor.image_token  # type: ignore[attr-defined]

    @property
    def plain_image_text(self) -> str:
        return f"{self.processor.vision_start_token}{self.image_token}{self.processor.vision_end_token}"  # type: ignore[attr-defined]

    def process_images(self, images: Tensor) -> ImageInputs:
        output = self.processor.image_processor(  # type: ignore[attr-defined]
            images=self.images_for_processor(images, 1), return_tensors="pt"
        )
        return self.image_inputs_from_processor(output)

    def images_for_processor(self, images: Tensor, num_views: int) -> Tensor:
        return images.permute(0, 3, 1, 2)  # flat: the processor hands them out as it meets their placeholders

    def image_inputs_from_processor(self, output: Any) -> ImageInputs:
        grids = output["image_grid_thw"].cpu()  # stays there: only the host reads it, and must not wait for it
        tensors = {"pixel_values": output["pixel_values"].to(self.device), "image_grid_thw": grids}
        return ImageInputs(tensors, [tuple(grid) for grid in grids.tolist()])

    def image_ids(self, layout: tuple[int, ...]) -> list[int]:
        time, height, width = layout
        return [self._image_token_id] * (time * height * width // self._merge**2)

    def build_positions(self, ids: Tensor, layouts: list[tuple[int, ...]]) -> Tensor:
        """Equal to `Qwen3VLModel.get_rope_index` of the same prompt without padding."""
        is_image = ids == self._image_token_id
        parts: list[Tensor] = []
        start, position = 0, 0
        for time, height, width in layouts:
            rows, columns = height // self._merge, width // self._merge
            image_start = start + int(is_image[start:].to(torch.uint8).argmax())
            parts.append((position + torch.arange(image_start - start)).expand(3, -1))
            position += image_start - start
            # the temporal axis stands still: Qwen3-VL tells time in words, not in positions
            frames = torch.zeros(time, rows, columns, dtype=torch.long)
            grid = torch.stack(
                [frames, frames + torch.arange(rows)[:, None], frames + torch.arange(columns)]
            )  # (3, t, rows, columns)
            parts.append(position + grid.flatten(1))
            position += max(rows, columns)
            start = image_start + time * rows * columns
        parts.append((position + torch.arange(len(ids) - start)).expand(3, -1))
        return torch.cat(parts, dim=1)

    def forward(
        self,
        tokens: TokenBatch,
        images: ImageInputs | None = None,
        *,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, DynamicCache | None]:
        # what holds text alone needs no search for image tokens
        model = self.model.model if images is not None else self.model.model.language_model  # type: ignore[union-attr]
        output = model(  # type: ignore[operator]
            input_ids=tokens.ids,
            attention_mask=self._attention_mask(tokens, cache),
            position_ids=tokens.positions,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
            **(images.tensors if images is not None else {}),
        )
        return output.last_hidden_state, output.past_key_values

    def _generate_arguments(self, tokens: TokenBatch, images: ImageInputs) -> dict[str, Tensor]:
        tensors = {name: tensor.to(self.device) for name, tensor in images.tensors.items()}
        return {**tensors, "mm_token_type_ids": (tokens.ids == self._image_token_id).int()}

    def vision_parameters(self) -> list[nn.Parameter]:
        return list(self.model.model.visual.parameters())  # type: ignore[union-attr]
