"""LeRobot's longest warnings, in a line each."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from lerobot.datasets.sampler import EpisodeAwareSampler

from lerobot_hlrp import log_filters

COMMAND = """
import importlib, logging, os, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import lerobot_policy_hlrp
from lerobot_hlrp.log_filters import ask_for_short_warnings
from lerobot.utils import import_utils
if "ask" in sys.argv:
    ask_for_short_warnings()
importlib.import_module = lambda name: exec('raise OSError("a\\\\nlong\\\\ntraceback")')
importlib.util.find_spec = lambda name: True
for _ in range(2):
    assert import_utils.get_safe_default_video_backend() == "pyav"
print("asked:", os.environ.get("HLRP_SHORT_WARNINGS"))
"""


def decoder_warnings(*arguments: str, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HLRP_")} | environment
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_our_commands_and_those_they_start_say_in_one_line_how_videos_are_decoded():
    for text in (decoder_warnings("ask"), decoder_warnings(HLRP_SHORT_WARNINGS="1")):
        assert text.startswith("Videos are decoded with PyAV")
        assert text.count("\n") == 2
        assert text.endswith("asked: 1\n")


def test_lerobots_own_commands_and_debugging_show_it_all():
    for text in (decoder_warnings(), decoder_warnings("ask", HLRP_DEBUG="1")):
        assert text.count("long\ntraceback") == 2
        assert text.endswith("asked: None\n")


def test_a_warning_that_is_one_line_already_stays():
    record = logging.makeLogRecord({"msg": "'torchcodec' is not available"})
    assert log_filters.DecoderFallback().filter(record)
    assert record.msg == "'torchcodec' is not available"


def test_episodes_without_labels_are_counted_and_not_listed(caplog: pytest.LogCaptureFixture):
    lengths, ends = [3, 9, 2, 5], [3, 12, 14, 19]
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    caplog.set_level(logging.INFO)
    try:
        log_filters.report_short_episodes(lengths, 3)
        sampler = EpisodeAwareSampler(starts, ends, drop_n_last_frames=3)
    finally:
        logging.getLogger("lerobot.datasets.sampler").removeFilter(log_filters._skipped)
    assert sorted(sampler) == [3, 4, 5, 6, 7, 8, 14, 15]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 episodes have no more than the 3 frames that a label spans: they have none, and are skipped."
    ]


def test_nothing_is_said_where_all_episodes_have_labels(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    try:
        log_filters.report_short_episodes([4, 9], 3)
    finally:
        logging.getLogger("lerobot.datasets.sampler").removeFilter(log_filters._skipped)
    assert not caplog.records
