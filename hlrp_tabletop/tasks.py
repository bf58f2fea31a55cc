"""What a task is, and the words for it.

A scene never holds two objects of one colour, nor two places of one colour, so every instruction means exactly one
object (and one place). The shape's name is said as well, as a person would.
"""

from dataclasses import dataclass
from difflib import get_close_matches

TIERS = ("reach", "push")
INSTRUCTION_MODES = ("true", "shuffled", "none")
PHRASINGS = ("fixed", "varied")

COLOURS = {
    "red": (214, 32, 38),
    "orange": (255, 133, 20),
    "yellow": (250, 216, 40),
    "green": (36, 158, 62),
    "blue": (30, 90, 214),
    "purple": (138, 56, 186),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPE_NAMES = ("disc", "block", "triangle", "cross")

# The first template of a tier is the one that `phrasing="fixed"` uses.
TEMPLATES = {
    "reach": ("reach the {object}", "go to the {object}", "move to the {object}", "touch the {object}"),
    "push": (
        "push the {object} to the {place}",
        "move the {object} to the {place}",
        "bring the {object} to the {place}",
        "shove the {object} into the {place}",
    ),
}


@dataclass(frozen=True)
class Task:
    """What success means in one episode, and what the policy is told.

    `target` and `place` index the scene's objects and places and alone decide success (`place` is None when reaching).
    `spoken` indexes the object that `instruction` names: `target`, or another one when instructions are shuffled.
    """

    tier: str
    target: int
    place: int | None
    spoken: int
    instruction: str


def instruction_text(tier: str, object_name: str, place_name: str | None, template: int = 0) -> str:
    """The sentence for one object ("red disc") and, when pushing, one place ("green corner")."""
    return TEMPLATES[tier][template].format(object=object_name, place=place_name)


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        close = get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}. Next step: Choose one of these.{hint}"
        )
