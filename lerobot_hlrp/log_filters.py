"""LeRobot's longest warnings, in a line each.

Where FFmpeg's libraries are missing, every command of LeRobot's prints three times a hundred lines of tracebacks before
it decodes videos with PyAV instead; and its sampler has a line for each episode that is too short for a label, which
can be thousands.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

logger = logging.getLogger(__name__)

SHORT_WARNINGS = "HLRP_SHORT_WARNINGS"
"""Environment variable: `1` in our own commands, and so in those of LeRobot's that they start."""

_DECODER = logging.getLogger("lerobot.utils.import_utils")
_SAMPLER = logging.getLogger("lerobot.datasets.sampler")


class DecoderFallback(logging.Filter):
    """The first warning of the fallback to PyAV in one line, and no second one."""

    def __init__(self) -> None:
        super().__init__()
        self.was_shown = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not ("torchcodec" in str(record.msg) and "\n" in str(record.msg)):
            return True
        is_first, self.was_shown = not self.was_shown, True
        record.msg = (
            "Videos are decoded with PyAV, as torchcodec cannot be loaded (it needs FFmpeg's libraries). "
            "HLRP_DEBUG=1 shows all that it says."
        )
        return is_first


class SkippedEpisodes(logging.Filter):
    """No line for each episode that the sampler skips: their number is logged by `report_short_episodes`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "removes all frames" not in str(record.msg)


_fallback, _skipped = DecoderFallback(), SkippedEpisodes()


def ask_for_short_warnings() -> None:
    """In this process and those that it starts; not with `HLRP_DEBUG=1`."""
    if not os.environ.get("HLRP_DEBUG"):
        os.environ[SHORT_WARNINGS] = "1"
    shorten_warnings()


def shorten_warnings() -> None:
    """If they are asked for."""
    if os.environ.get(SHORT_WARNINGS):
        _DECODER.addFilter(_fallback)


def report_short_episodes(lengths: Sequence[int], span: int) -> None:
    """Say once how many episodes have no label, in place of the sampler's line for each.

    Args:
        lengths: of all episodes, in frames.
        span: frames from the first to the last that a label is made from.
    """
    num_short = sum(length <= span for length in lengths)
    if num_short:
        logger.info(
            "%d of %d episodes have no more than the %d frames that a label spans: they have none, and are skipped.",
            num_short,
            len(lengths),
            span,
        )
    _SAMPLER.addFilter(_skipped)
