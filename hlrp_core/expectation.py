"""The one form of an error about user input: expected, got, next step."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


def expect(condition: bool, what: str, expected: str, got: Any, next_step: str) -> None:
    """Raises:
    ValueError: `condition` does not hold.
    """
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got}. Next step: {next_step}")


def expect_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises:
    ValueError: `value` is none of `choices`; the closest one is offered.
    """
    choices = list(choices)
    if value not in choices:
        close = get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        expect(False, name, f"one of {', '.join(choices)}", repr(value), f"Choose one of these.{hint}")


def expect_at_least(name: str, least: int, value: int) -> None:
    """Raises:
    ValueError: `value` is below `least`.
    """
    expect(value >= least, name, f"{least} or more", value, f"Use {least} or a larger number.")


def expect_file_path(name: str, path: Path) -> None:
    """Check, before the work whose result goes there, that a file can be written: a new one, or one that is replaced.

    Raises:
        ValueError: a folder is there, or a file where a folder would have to be.
    """
    expect(not path.is_dir(), name, "the path of a file, new or old", f"the folder {path}", "Name a file in it.")
    expect_folder_path(name, path.parent)


def expect_folder_path(name: str, path: Path) -> None:
    """Check, before the work whose result goes there, that a folder is there or can be made.

    Raises:
        ValueError: a file is there, or where a folder above it would have to be.
    """
    nearest = next(place for place in (path, *path.parents) if place.exists())
    expect(
        nearest.is_dir(),
        name,
        "a folder, new or old",
        f"the file {nearest}" if nearest == path else f"{path}, where {nearest} is a file",
        "Name another place.",
    )
