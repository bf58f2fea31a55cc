"""What all commands share: arguments in LeRobot's style, and errors that a person can read."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import draccus
from draccus.utils import ParsingError

from lerobot_hlrp.hub_folder import HUB_ERRORS, shorten_error
from lerobot_hlrp.log_filters import ask_for_short_warnings


def run_command[C](command: type[C], run: Callable[[C], Any], args: Sequence[str] | None = None) -> None:
    """Parse the arguments and run; end the process with status 1, and one message, on an error of the user's.

    `HLRP_DEBUG=1` shows the traceback as well. A run that returns an integer ends with that status.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    ask_for_short_warnings()
    try:
        parsed = draccus.parse(command, args=args)
        status = run(parsed)
    except (ValueError, ParsingError, *HUB_ERRORS) as error:
        if os.environ.get("HLRP_DEBUG"):
            raise
        cause = error.__cause__ if isinstance(error, ParsingError) and error.__cause__ is not None else error
        # ours are ValueErrors; what the system or the Hub says is kept to a line, and is nothing without its kind
        message = str(cause) if isinstance(cause, (ValueError, ParsingError)) else shorten_error(cause)
        print(f"error: {spell_flags(message, command)}\n(HLRP_DEBUG=1 shows where)", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(status, int) and status != 0:
        sys.exit(status)


def spell_flags(message: str, command: type) -> str:
    """A message with lerobot-train's `--policy.<name>` as the command at hand has it: `--<name>`."""
    own = {field.name for field in fields(command)}
    return re.sub(r"--policy\.(\w+)", lambda found: f"--{found[1]}" if found[1] in own else found[0], message)
