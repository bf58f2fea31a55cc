"""The one form of an error about user input: expected, got, next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def expect(condition: bool, what: str, expected: str, got: Any, next_step: str) -> None:
    """Raises:
    ValueError: `condition` does not hold.
    """
    if not condition:
        raise ValueError(f"{what}: expected {expected}, got {got}. Next step: {next_step}")


def expect_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises:
    ValueError: `value` is none of `choices`.
    """
    expect(value in choices, name, f"one of {', '.join(choices)}", repr(value), "Choose one of these.")
