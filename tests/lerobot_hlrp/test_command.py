"""How every command ends when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from httpx import ConnectError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from lerobot_hlrp.cli.command import run_command


@dataclass
class Command:
    number: int = 1


ERRORS = [
    OSError(28, "No space left on device"),
    NotADirectoryError(20, "Not a directory", "a/b"),
    OfflineModeIsEnabled("offline\nsecond line"),
    LocalEntryNotFoundError("not in the cache"),
    ConnectError("no route"),
    ValueError("number: expected 2, got 1. Next step: Add 1."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_one_line(error, capsys, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.delenv("HLRP_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit_:
        run_command(Command, fail, [])
    assert exit_.value.code == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("error: ")
    assert " ".join(str(error).split()) in printed[0]
    if not isinstance(error, ValueError):
        assert type(error).__name__ in printed[0]
    assert printed[1:] == ["(HLRP_DEBUG=1 shows where)"]
    monkeypatch.setenv("HLRP_DEBUG", "1")
    with pytest.raises(type(error)):
        run_command(Command, fail, [])


def test_a_programs_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("HLRP_DEBUG", raising=False)
    with pytest.raises(ZeroDivisionError):
        run_command(Command, lambda _: 1 / 0, [])
