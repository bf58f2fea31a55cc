"""The SmolVLM family (SmolVLM2) on transformers' own classes.

Notable: an image is one tile unless splitting is asked for (the published settings make 17 tiles, and so 1,088 tokens,
of one camera image); all tiles of a call have one size and are complete, so that neither padding nor a pixel mask
exists; and the vision tower is run part by part, because `SmolVLMModel` takes tiles that are all zeros for padding and
drops them, and finds the patches' positions anew in every call.

Shape legend: B batch, L tokens, N images, M tiles of all images, R rows and columns of a tile's patches, W hidden
width; a layout is the image's tiles (rows, columns), (0, 0) for an image in one tile.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin, SmolVLMImageProcessor
from transformers.image_utils import PILImageResampling

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.token_batch import ImageInputs, TokenBatch

# What the processor writes for an image: its tiles, where there are several, and last the whole image.
_TILE_MARK = re.compile(r"<row_(\d+)_col_(\d+)>|<global-img>")


class SmolVLMCore(ModelCore):
    """Args as in `ModelCore`.

    `image_size`: pixels along the side of a tile; an image in one tile is scaled to this square.
    `image_splitting`: the image in several tiles, as many as the checkpoint's settings say, and then the whole of it.

    Raises:
        ValueError: `image_size` does not fit the model's patches.
    """

    family = "smolvlm"
    model_class = "SmolVLMForConditionalGeneration"
    model_types = ("smolvlm",)

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        image_size: int | None = None,
        image_splitting: bool = False,
    ):
        super().__init__(model, processor)
        config = model.config
        settings = _torch_image_processor(processor.image_processor)  # type: ignore[attr-defined]
        tile = settings.max_image_size["longest_edge"]
        side = tile if image_size is None else image_size
        step = config.vision_config.patch_size * config.scale_factor  # type: ignore[union-attr, operator]
        _check_tile(side, step)
        settings.size = {"longest_edge": settings.size["longest_edge"] * side // tile}
        settings.max_image_size = {"longest_edge": side}
        settings.do_image_splitting = image_splitting
        settings.do_resize = image_splitting  # first to the size of all tiles; one tile needs no such detour
        settings.do_pad = False  # every tile is complete
        processor.image_processor = settings  # type: ignore[attr-defined]
        processor.image_seq_len = (side // step) ** 2  # type: ignore[attr-defined]

        self._image_token_id: int = config.image_token_id  # type: ignore[assignment]
        self._image_ids: dict[tuple[int, ...], list[int]] = {}
        vision = config.vision_config
        positions = _patch_positions(side // vision.patch_size, vision.image_size // vision.patch_size)  # type: ignore[union-attr, operator]
        self.register_buffer("_positions", positions, persistent=False)

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
        return self.image_token  # its frame is part of what stands for the image: see `image_ids`

    def find_image_token(self, text: str) -> str | None:
        mark = _TILE_MARK.search(text)
        return mark[0] if mark else super().find_image_token(text)

    def process_images(self, images: Tensor) -> ImageInputs:
        output = self.processor.image_processor(  # type: ignore[attr-defined]
            images=self.images_for_processor(images, 1),
            return_row_col_info=True,
            disable_grouping=False,  # one batch, also on a CPU
            return_tensors="pt",
        )
        tiles = zip(output["rows"], output["cols"], strict=True)
        return self._image_inputs(output["pixel_values"], [(rows[0], columns[0]) for rows, columns in tiles])

    def images_for_processor(self, images: Tensor, num_views: int) -> list[list[Tensor]]:
        return [list(views) for views in images.permute(0, 3, 1, 2).split(num_views)]

    def image_inputs_from_processor(self, output: Any) -> ImageInputs:
        # the processor keeps rows and columns to itself, but has written them into the text
        layouts: list[tuple[int, ...]] = []
        rows = columns = 0
        for text in self.tokenizer.batch_decode(output["input_ids"]):
            for mark in _TILE_MARK.finditer(text):
                if mark[1] is not None:
                    rows, columns = int(mark[1]), int(mark[2])  # the last tile's are the largest
                else:
                    layouts.append((rows, columns))
                    rows = columns = 0
        return self._image_inputs(output["pixel_values"], layouts)

    def _image_inputs(self, pixel_values: Tensor, layouts: list[tuple[int, ...]]) -> ImageInputs:
        """Tiles `[B, M / B, 3, H, W]` as one row `[1, M, 3, H, W]`: the model does not care whose they are."""
        assert pixel_values.shape[0] * pixel_values.shape[1] == sum(max(1, r * c + (r > 0)) for r, c in layouts)
        return ImageInputs({"pixel_values": pixel_values.flatten(0, 1)[None].to(self.device)}, layouts)

    def image_ids(self, layout: tuple[int, ...]) -> list[int]:
        if layout not in self._image_ids:
            rows, columns = layout
            text = self.processor.expand_text_with_image_tokens([self.image_token], [[rows]], [[columns]])[0]  # type: ignore[attr-defined]
            self._image_ids[layout] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._image_ids[layout]

    def build_positions(self, ids: Tensor, layouts: list[tuple[int, ...]]) -> Tensor:
        return torch.arange(len(ids))[None]  # (1, L)

    def encode_images(self, images: ImageInputs) -> Tensor:
        """What stands in the place of the image tokens: `[M, tokens of a tile, W]`.

        Equal to `SmolVLMModel.get_image_features`, but for tiles that are all zeros, which that would drop.
        """
        model = self.model.model
        tower = model.vision_model  # type: ignore[union-attr]
        pixels = images.tensors["pixel_values"].flatten(0, 1).to(self.model.dtype)  # (M, 3, H, W)
        patches = tower.embeddings.patch_embedding(pixels)  # type: ignore[union-attr, operator]  # (M, width, R, R)
        embeds = patches.flatten(2).transpose(1, 2) + tower.embeddings.position_embedding(self._positions)  # type: ignore[union-attr, operator]
        hidden = tower.encoder(inputs_embeds=embeds).last_hidden_state  # type: ignore[union-attr, operator]
        return model.connector(tower.post_layernorm(hidden))  # type: ignore[union-attr, operator]

    def forward(
        self,
        tokens: TokenBatch,
        images: ImageInputs | None = None,
        *,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, DynamicCache | None]:
        embeds = self.model.get_input_embeddings()(tokens.ids)  # (B, L, W)
        if images is not None:
            # image tokens and features come in the same order: row by row, image by image, tile by tile
            is_image = (tokens.ids == self._image_token_id)[..., None]
            embeds = embeds.masked_scatter(is_image, self.encode_images(images).to(embeds.dtype))
        output = self.model.model.text_model(  # type: ignore[union-attr, operator]
            inputs_embeds=embeds,
            attention_mask=self._attention_mask(tokens, cache),
            position_ids=tokens.positions[0],
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
        )
        return output.last_hidden_state, output.past_key_values

    def _generate_arguments(self, tokens: TokenBatch, images: ImageInputs) -> dict[str, Tensor]:
        return {"image_hidden_states": self.encode_images(images)}  # not the pixels: a tile of zeros would be dropped

    def vision_parameters(self) -> list[nn.Parameter]:
        return list(self.model.model.vision_model.parameters())  # type: ignore[union-attr]


def _torch_image_processor(processor: Any) -> Any:
    """The same settings on torch tensors, in a batch and on their device.

    transformers loads the PIL processor for this family, because its settings name Lanczos, which torchvision lacks; it
    takes images one by one, on the CPU. Bicubic is what torchvision would use in its place.
    """
    if not isinstance(processor, SmolVLMImageProcessor):
        processor = SmolVLMImageProcessor.from_dict(processor.to_dict())
    if processor.resample == PILImageResampling.LANCZOS:
        processor.resample = PILImageResampling.BICUBIC
    return processor


def _check_tile(side: int, step: int) -> None:
    if side < step or side % step:
        near = max(step, round(side / step) * step)
        raise ValueError(
            f"image_size: expected a multiple of {step} (the model's patch size times its scale factor), got {side}. "
            f"Next step: for example image_size={near}."
        )


def _patch_positions(rows: int, table_rows: int) -> Tensor:
    """Rows of a position table of `table_rows` squared entries for a tile of R = `rows` by `rows` patches: `[R * R]`.

    In float32 as in `SmolVLMVisionEmbeddings`, whose rounding belongs to the weights that were trained with it.
    """
    boundaries = torch.arange(1 / table_rows, 1.0, 1 / table_rows)
    fractions = torch.clamp(torch.arange(rows, dtype=torch.float32) * (1.0 / torch.tensor(rows)), max=1.0 - 1e-6)
    buckets = torch.bucketize(fractions, boundaries, right=True)  # (R,)
    return (buckets[:, None] * table_rows + buckets).flatten()
