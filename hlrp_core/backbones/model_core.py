"""ModelCore: one family of vision-language models behind five verbs.

A core loads the weights and owns the processor; it knows how an image becomes tokens and positions, and runs the
backbone. It knows nothing of prompts' wording, codes or actions.

Shape legend: B batch, L tokens, W hidden width, V vocabulary rows, P position axes (1, or 3 for multimodal rope),
N images of a call, H W image height and width.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hlrp_core.backbones.code_rows import CodeRows, replace_embeddings, replace_logits
from hlrp_core.backbones.tied_table import one_gradient
from hlrp_core.backbones.token_batch import ImageInputs, TokenBatch


class ModelCore(nn.Module, abc.ABC):
    """A vision-language model of one family.

    Args:
        model: the family's own transformers class.
        processor: the checkpoint's own processor.
    """

    family: ClassVar[str]
    model_class: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        super().__init__()
        self.model = model
        self.processor = processor
        self._shared_projection: Tensor | None = None
        self.code_rows: CodeRows | None = None  # the tables are trained as they are

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    @abc.abstractmethod
    def hidden_dim(self) -> int:
        """W."""

    @property
    @abc.abstractmethod
    def max_positions(self) -> int:
        """The longest sequence the model was made for."""

    @property
    @abc.abstractmethod
    def image_token(self) -> str:
        """The placeholder that chat templates write for an image."""

    @property
    @abc.abstractmethod
    def plain_image_text(self) -> str:
        """What a plain prompt writes for an image, `image_token` included."""

    def find_image_token(self, text: str) -> str | None:
        """A token in `text` that stands for an image or a part of one: only the prompt's own images have these."""
        return self.image_token if self.image_token in text else None

    @abc.abstractmethod
    def process_images(self, images: Tensor) -> ImageInputs:
        """Images `[N, H, W, 3]` uint8 -> the model's own inputs, on the same device. One processor call."""

    @abc.abstractmethod
    def images_for_processor(self, images: Tensor, num_views: int) -> Any:
        """Images `[B * num_views, H, W, 3]` as the whole processor takes them beside B texts."""

    @abc.abstractmethod
    def image_inputs_from_processor(self, output: Any) -> ImageInputs:
        """The image part of the whole processor's output."""

    @abc.abstractmethod
    def image_ids(self, layout: tuple[int, ...]) -> list[int]:
        """Ids that take the place of `image_token` for an image of this layout."""

    @abc.abstractmethod
    def build_positions(self, ids: Tensor, layouts: list[tuple[int, ...]]) -> Tensor:
        """Positions `[P, L]` of one prompt `[L]` whose images have these layouts."""

    @abc.abstractmethod
    def forward(
        self,
        tokens: TokenBatch,
        images: ImageInputs | None = None,
        *,
        cache: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Last hidden states `[B, L, W]` of `tokens` (behind `cache`, where one is given), and the grown cache."""

    def generate(self, tokens: TokenBatch, images: ImageInputs, settings: GenerationConfig, **kwargs: Any) -> Tensor:
        """New ids `[B, N]` by Hugging Face `generate`: the slow reference of decoding.

        Args:
            settings: all of them. The checkpoint's own, such as a repetition penalty for chat, have no say.
            kwargs: further ones of `generate` that are no settings, such as `prefix_allowed_tokens_fn`.
        """
        of_checkpoint = self.model.generation_config
        self.model.generation_config = settings  # `generate` fills what `settings` leaves open from here
        try:
            ids = self.model.generate(  # type: ignore[operator]
                input_ids=tokens.ids,
                attention_mask=tokens.valid_mask.long(),
                generation_config=settings,
                **self._generate_arguments(tokens, images),
                **kwargs,
            )
        finally:
            self.model.generation_config = of_checkpoint
        return ids[:, tokens.ids.shape[1] :]

    @abc.abstractmethod
    def _generate_arguments(self, tokens: TokenBatch, images: ImageInputs) -> dict[str, Tensor]:
        """What `generate` gets beside the ids and their mask."""

    @abc.abstractmethod
    def vision_parameters(self) -> list[nn.Parameter]:
        """Parameters of the vision tower."""

    def _attention_mask(self, tokens: TokenBatch, cache: DynamicCache | None) -> Tensor | None:
        if cache is None or self.model.config._attn_implementation != "sdpa":
            # without padding the mask says nothing that causality does not, and SDPA is faster without one
            return tokens.valid_mask if tokens.is_padded else None
        # Complete already: transformers' general mechanism costs a decoding step as much as a layer of a small model.
        num_new, num_all = tokens.ids.shape[1], tokens.valid_mask.shape[1]
        causal = torch.ones(num_new, num_all, dtype=torch.bool, device=tokens.ids.device).tril(num_all - num_new)
        return tokens.valid_mask[:, None, None, :] & causal  # (B, 1, new, all)

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def projection_weight(self) -> Tensor:
        """`[V, W]`, to project hidden states with for a loss."""
        return self.lm_head.weight if self._shared_projection is None else self._shared_projection

    @contextmanager
    def learning_tokens(self) -> Iterator[None]:
        """For a loss through `projection_weight`: both uses of a tied vocabulary table then give one gradient.

        Nothing but speed depends on it.
        """
        with one_gradient(self.model.get_input_embeddings(), self.lm_head) as weight:  # type: ignore[arg-type]
            # the parameter itself, where nothing is shared, would become one of this module's own by the assignment
            self._shared_projection = None if weight is self.lm_head.weight else weight
            try:
                yield
            finally:
                self._shared_projection = None

    def check_length(self, num_tokens: int) -> None:
        """Raises:
        ValueError: the sequence is longer than the model's context; nothing is cut silently.
        """
        if num_tokens > self.max_positions:
            raise ValueError(
                f"prompt: expected at most {self.max_positions} tokens (the model's context), got {num_tokens}. "
                "Next step: shorten the instruction, system prompt or few-shot text, or make the images smaller."
            )

    def grow_vocabulary(self, *, num_old: int, new_ids: Tensor, seed: int = 0) -> None:
        """Initialise the rows of `new_ids` in the embedding and in the output projection.

        Rows are added only when the table is too short: real checkpoints have spare rows. New rows start at the mean
        of the `num_old` old ones plus small noise from a seeded generator: equal in every process, distinct from
        each other. Without `new_ids` nothing changes.
        """
        if len(new_ids) == 0:
            return
        needed = int(new_ids.max()) + 1
        embedding = self.model.get_input_embeddings()
        if needed > embedding.weight.shape[0]:  # type: ignore[operator]
            self.model.resize_token_embeddings(needed, mean_resizing=False)
            self.lm_head.out_features = self.lm_head.weight.shape[0]  # transformers forgets it where tables are tied
        tables = {id(m.weight): m.weight for m in (self.model.get_input_embeddings(), self.lm_head)}  # tied: one
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for table in tables.values():
                old = table[:num_old].float()  # type: ignore[index]
                noise = torch.randn(len(new_ids), old.shape[1], generator=generator).to(old.device)
                table[new_ids.to(old.device)] = (old.mean(0) + 0.5 * old.std(0) * noise).to(table.dtype)  # type: ignore[index]

    def train_code_rows(self, ids: Tensor) -> None:
        """Freeze the embedding and the output projection, but for the rows of `ids`, which are consecutive.

        The rows of `code_rows` stand in for theirs in every forward, that of Hugging Face `generate` included. The
        tables' own are brought up to date whenever a state dict is taken, so that a checkpoint is an ordinary one.
        """
        embedding, projection = self.model.get_input_embeddings(), self.lm_head
        self.code_rows = CodeRows(embedding.weight, projection.weight, ids)  # type: ignore[arg-type]
        # `self.code_rows` is looked up in every call: an adapter replaces the module
        embedding.register_forward_hook(self._embed_code_rows)
        projection.register_forward_hook(self._project_code_rows)
        for table in (embedding, projection):
            table.register_state_dict_pre_hook(self._write_code_rows)

    def _embed_code_rows(self, _: nn.Module, args: tuple[Tensor, ...], embeds: Tensor) -> Tensor:
        assert self.code_rows is not None
        return replace_embeddings(embeds, args[0], self.code_rows("embedding"), self.code_rows.span)

    def _project_code_rows(self, _: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        assert self.code_rows is not None
        return replace_logits(logits, args[0], self.code_rows("projection"), self.code_rows.span)

    @torch.no_grad()
    def _write_code_rows(self, *_: Any) -> None:
        assert self.code_rows is not None
        span = self.code_rows.span
        self.model.get_input_embeddings().weight[span] = self.code_rows("embedding")  # type: ignore[index, operator]
        self.lm_head.weight[span] = self.code_rows("projection")

    @torch.no_grad()
    def read_code_rows(self) -> None:
        """Take the trained rows from the tables: after weights were loaded into these."""
        if self.code_rows is not None:
            span = self.code_rows.span
            self.code_rows("embedding").copy_(self.model.get_input_embeddings().weight[span])  # type: ignore[index]
            self.code_rows("projection").copy_(self.lm_head.weight[span])

    def projection_rows(self, ids: Tensor) -> Tensor:
        """Rows `[N, W]` of the output projection, of code tokens `ids` `[N]`."""
        if self.code_rows is None:
            return self.projection_weight[ids]
        return self.code_rows("projection")[ids - self.code_rows.span.start]

    def save_architecture(self, folder: Path) -> None:
        """Write the backbone's `config.json` and the processor's files: everything but the weights."""
        self.model.config.save_pretrained(folder)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(folder)
        save_processor(self.processor, folder)


def save_processor(processor: ProcessorMixin, folder: Path) -> None:
    """Save a processor as JSON files alone, so that every part of it survives an upload to the Hub.

    LeRobot uploads `*.json` but no `*.jinja` and no `*.txt`: the chat template goes into `chat_template.json`, and
    `tokenizer.json` carries vocabulary and merges.
    """
    processor.save_pretrained(folder)
    for path in [*folder.glob("*.txt"), *folder.glob("*.jinja")]:
        path.unlink()
    if getattr(processor, "chat_template", None):
        text = json.dumps({"chat_template": processor.chat_template}, indent=2)  # type: ignore[attr-defined]
        (folder / "chat_template.json").write_text(text, encoding="utf-8")
