"""Prompts as a plain string, for backbones without a chat template and for comparison with one."""

from __future__ import annotations

from hlrp_core.prompting.prompt import ImageSlot, Piece, TemplateText, UserText
from hlrp_core.prompting.strategy import PromptingStrategy


class PlainPrompting(PromptingStrategy):
    """System prompt, few-shot text, images and instruction on lines of their own."""

    def build_pieces(self, num_images: int) -> list[Piece]:
        config, core = self.config, self.core
        before, after = core.plain_image_text.split(core.image_token)
        image = [TemplateText(before), ImageSlot(), TemplateText(after)]
        images: list[Piece] = image * num_images
        header = "".join(f"{text}\n" for text in (config.system, config.few_shot) if text)
        if config.image_position == "before":
            pieces = [TemplateText(header), *images, UserText(), TemplateText("\n")]
        else:
            pieces = [TemplateText(header), UserText(), *images, TemplateText("\n")]
        return [piece for piece in pieces if piece != TemplateText("")]
