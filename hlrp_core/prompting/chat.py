"""Prompts by the processor's own chat template."""

from __future__ import annotations

import re

from hlrp_core.prompting.prompt import ImageSlot, Piece, TemplateText, UserText
from hlrp_core.prompting.strategy import PromptingStrategy

_INSTRUCTION = "@@hlrp-instruction@@"  # rendered by the template like any words, then found again


class ChatPrompting(PromptingStrategy):
    """One user turn with the images and the instruction, and the opening of the assistant's turn.

    Raises:
        ValueError: the processor has no chat template.
    """

    def build_pieces(self, num_images: int) -> list[Piece]:
        processor, config = self.core.processor, self.config
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"prompting=chat: expected a processor with a chat template, got {type(processor).__name__} without "
                "one. Next step: choose prompting=plain, or a checkpoint whose processor has a chat template."
            )
        text = f"{config.few_shot}\n{_INSTRUCTION}" if config.few_shot else _INSTRUCTION
        images = [{"type": "image"}] * num_images
        words = [{"type": "text", "text": text}]
        content = images + words if config.image_position == "before" else words + images
        messages = [{"role": "user", "content": content}]
        if config.system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": config.system}]})
        rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        image_token = self.core.image_token
        parts = re.split(f"({re.escape(_INSTRUCTION)}|{re.escape(image_token)})", rendered)  # type: ignore[arg-type]
        marks = {_INSTRUCTION: UserText(), image_token: ImageSlot()}
        pieces = [marks.get(part, TemplateText(part)) for part in parts if part]
        if pieces.count(UserText()) != 1 or pieces.count(ImageSlot()) != num_images:
            raise ValueError(
                f"prompting=chat: expected the chat template to write the instruction once and {num_images} image(s), "
                f"got {rendered!r}. Next step: choose prompting=plain."
            )
        return pieces
