"""The settings of a prompt, and the pieces that a prompting strategy composes it from.

The comment above a setting is its help text on the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ImagePosition = Literal["before", "after"]
LengthSource = Literal["tokenizer", "processor"]
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)  # prompts are kept: a setting that changed later would be obeyed by the new ones alone
class PromptConfig:
    """What stands around the image and the instruction. Travels with the checkpoint.

    Raises:
        ValueError: a setting is out of range, or a template lacks its slot.
    """

    # System prompt; empty for none. May hold special tokens, but none that stands for an image.
    system: str = ""
    # Text before the instruction, such as worked examples. May hold special tokens as `system` may.
    few_shot: str = ""
    # `{instruction}` stands for the user's words, in which special tokens are plain text. What is around them is
    # encoded with them, so that special tokens are refused here: they would come out as plain text, too.
    instruction_template: str = "{instruction}"
    # False hides the user's words from the model: the baseline that cannot listen.
    use_instruction: bool = True
    # Write the normalised state at time t behind the words, on a line of its own, as whole numbers. Off, only an action
    # head sees the state.
    state_text: bool = False
    # `{state}` stands for the numbers, with blanks between them. No special tokens either.
    state_template: str = "State: {state};"
    # How many numbers there are: 0 to `state_bins` - 1.
    state_bins: int = 256
    # The bins divide [-`state_range`, `state_range`] evenly, and what lies beyond falls into the outer ones. The
    # default suits a state normalised to mean 0 and standard deviation 1; for one in [-1, 1] it is 1.
    state_range: float = 3.0
    # Of the image, relative to the words. `after` lets the image's tokens attend to the words under a causal mask: a
    # model trained from scratch needs it to learn what the words point at.
    image_position: ImagePosition = "after"
    # Who finds the prompt's ids and so its length: the `tokenizer` alone, with the image's token count from its grid,
    # or the `processor`'s own output. Both are compared once, with each number of images.
    length_from: LengthSource = "tokenizer"
    # In training. Prediction always pads left.
    padding_side: PaddingSide = "left"

    def __post_init__(self) -> None:
        for field, slot, belongs in (
            ("instruction_template", "{instruction}", "the user's words"),
            ("state_template", "{state}", "the numbers"),
        ):
            if getattr(self, field).count(slot) != 1:
                raise ValueError(
                    f"prompt.{field}: expected '{slot}' once, got {getattr(self, field)!r}. "
                    f"Next step: put it where {belongs} belong."
                )
        if self.state_bins < 2:
            raise ValueError(f"prompt.state_bins: expected 2 or more, got {self.state_bins}. Next step: raise it.")
        if not 0 < self.state_range < math.inf:
            raise ValueError(
                f"prompt.state_range: expected a number above 0, got {self.state_range}. Next step: for example 3, or "
                "1 for a state normalised to [-1, 1]."
            )
        for field, choices in (
            ("image_position", ("before", "after")),
            ("length_from", ("tokenizer", "processor")),
            ("padding_side", ("left", "right")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"prompt.{field}: expected one of {choices}, got {getattr(self, field)!r}. "
                    "Next step: choose one of these."
                )


@dataclass(frozen=True)
class TemplateText:
    """Text of the template; special tokens in it count as such."""

    text: str


@dataclass(frozen=True)
class UserText:
    """Where the instruction goes, and the state's text behind it.

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
