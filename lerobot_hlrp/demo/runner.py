"""Runs the demo's steps as the plain commands that a user can type, and picks up where it stopped.

A finished step leaves a marker with its command and its wall time; a step whose command has changed runs again, and so
does everything after it. An interrupted step is handed back to its own command, which continues or starts anew.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hlrp_core.bundle import write_json


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Args:
        name: of its marker and its log.
        title: what it does, in a line for the reader.
        command: program and arguments.
        output: the file or folder it makes; one that an interrupted run left is deleted before a fresh start.
        resume: the command that continues an interrupted run, or None where there is nothing to continue from.
            Commands that continue by themselves return `command`.
    """

    name: str
    title: str
    command: list[str]
    output: Path
    resume: Callable[[], list[str] | None] = field(default=lambda: None)


class StepError(RuntimeError):
    """A step's command ended with an error; its log says why."""


class StepRunner:
    """Runs steps in order, skipping those that are done.

    Args:
        folder: the demo's folder; markers and logs go below it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.markers = folder / "steps"
        self.logs = folder / "logs"
        self._upstream_changed = False
        for path in (self.markers, self.logs):
            path.mkdir(parents=True, exist_ok=True)

    def run_all(self, steps: list[Step]) -> None:
        """Raises:
        StepError: a command failed.
        KeyboardInterrupt: the user interrupted; the finished steps keep.
        """
        for number, step in enumerate(steps, start=1):
            print(f"\n\033[1m[{number}/{len(steps)}] {step.title}\033[0m\n  {shlex.join(step.command)}", flush=True)
            if self._is_done(step):
                print(f"  done before, in {self.wall_s(step):.0f} s")
                continue
            self._upstream_changed = True
            self._run(step)

    def wall_s(self, step: Step) -> float:
        """Seconds that the step took, all its interrupted runs included."""
        return self._read(step).get("wall_s", 0.0)

    def log_path(self, step: Step) -> Path:
        return self.logs / f"{step.name}.log"

    def _marker(self, step: Step) -> Path:
        return self.markers / f"{step.name}.json"

    def _read(self, step: Step) -> dict:
        marker = self._marker(step)
        return json.loads(marker.read_text()) if marker.is_file() else {}

    def _is_done(self, step: Step) -> bool:
        seen = self._read(step)
        return not self._upstream_changed and bool(seen.get("done")) and seen.get("command") == step.command

    def _run(self, step: Step) -> None:
        before = self._read(step)
        continues = bool(before) and not before.get("done") and before.get("command") == step.command
        continued = step.resume() if continues else None
        command = continued or step.command
        if continued is None:
            _delete(step.output)
        if command != step.command:
            print(f"  continuing: {shlex.join(command)}", flush=True)
        spent = before.get("wall_s", 0.0) if continues else 0.0
        write_json(self._marker(step), {"command": step.command, "done": False, "wall_s": spent})
        start = time.perf_counter()
        code = -1
        try:
            code = run_logged(command, self.log_path(step), append=continues)
        finally:
            spent += time.perf_counter() - start
            write_json(self._marker(step), {"command": step.command, "done": code == 0, "wall_s": spent})
        if code != 0:
            raise StepError(
                f"step '{step.name}': expected its command to succeed, got exit status {code}. "
                f"Next step: read {self.log_path(step)}, then run the same demo command again; finished steps are kept."
            )


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_logged(command: list[str], log: Path, *, append: bool = False) -> int:
    """Run a command, showing what it prints and keeping it in `log`; returns its exit status.

    An interrupt reaches the command too (same process group): it may save its state before this raises.
    """
    # One thread unless the user wants more: models this small gain little from a second one, which also has to wait
    # whenever anything else runs (a data loader, another program), and results then depend on the number of cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise StepError(f"expected the command {command[0]} to be installed, got none. Next step: pip install -e .")
    with log.open("ab" if append else "wb") as file:
        process = subprocess.Popen(
            [program, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
                file.write(chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            return process.wait()
        except BaseException:
            # the terminal has already told the command; from elsewhere (kill) it has to be passed on
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
