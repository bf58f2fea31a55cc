"""The settings of a prompt, and the pieces that a prompting strategy composes it from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImagePosition = Literal["before", "after"]
LengthSource = Literal["tokenizer", "processor"]
PaddingSide = Literal["left", "right"]


@dataclass
class PromptConfig:
    """What stands around the image and the instruction. Travels with the checkpoint.

    Args:
        system: system prompt; `""` for none. May hold special tokens.
        few_shot: text before the instruction, such as worked examples. May hold special tokens.
        instruction_template: `{instruction}` stands for the user's words, which are always plain text.
        use_instruction: False hides the user's words from the model: the baseline that cannot listen.
        image_position: of the image, relative to the words. `after` lets the image's tokens attend to the words
            under a causal mask: a model trained from scratch needs it to learn what the words point at.
        length_from: who finds the prompt's ids and so its length: the `tokenizer` alone, with the image's token
            count from its grid, or the `processor`'s own output. Both are compared once, at setup.
        padding_side: in training. Prediction always pads left.
    """

    system: str = ""
    few_shot: str = ""
    instruction_template: str = "{instruction}"
    use_instruction: bool = True
    image_position: ImagePosition = "after"
    length_from: LengthSource = "tokenizer"
    padding_side: PaddingSide = "left"

    def __post_init__(self) -> None:
        if self.instruction_template.count("{instruction}") != 1:
            raise ValueError(
                "prompt.instruction_template: expected '{instruction}' once, got "
                f"{self.instruction_template!r}. Next step: put it where the user's words belong."
            )
        for field, choices in (
            ("image_position", ("before", "after")),
            ("length_from", ("tokenizer", "processor")),
            ("padding_side", ("left", "right")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"prompt.{field}: expected one of {choices}, got {getattr(self, field)!r}")


@dataclass(frozen=True)
class TemplateText:
    """Text of the template; special tokens in it count as such."""

    text: str


@dataclass(frozen=True)
class UserText:
    """Where the instruction goes.

    Args:
        before, after: text of the template beside it, without special tokens. It is encoded together with the
            instruction, because a tokenizer joins across that boundary: `User: ` and `reach` hold the token ` reach`.
    """

    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class ImageSlot:
    """Where the next image goes."""


Piece = TemplateText | UserText | ImageSlot
