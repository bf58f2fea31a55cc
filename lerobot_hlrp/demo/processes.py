"""Runs one command: what it prints goes to its log, and to the terminal where it has it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path


class Terminal:
    """The terminal, for the commands of one lane; those of a lane in the background print to their logs alone.

    Args:
        visible: whether what commands print is shown.
    """

    def __init__(self, *, visible: bool = True):
        self.visible = visible
        self.stopped = False
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def show(self, chunk: bytes) -> None:
        if self.visible:
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Raises:
        KeyboardInterrupt: the lane was stopped.
        """
        with self._lock:
            if self.stopped:
                raise KeyboardInterrupt
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            return self._process

    def stop(self) -> None:
        """Interrupt the lane's command, which may save its state, and start no other."""
        with self._lock:
            self.stopped = True
            if self._process is not None:
                interrupt(self._process)


def interrupt(process: subprocess.Popen, *, timeout_s: float = 60.0) -> None:
    """Ask a command to save its state and end; after a while it has to."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()


def run_logged(command: list[str], log: Path, *, terminal: Terminal, append: bool = False) -> int:
    """Run a command, keeping what it prints in `log`; returns its exit status.

    An interrupt reaches the command too (same process group): it may save its state before this raises.
    """
    # One thread unless the user wants more: models this small gain little from a second one, which also has to wait
    # whenever anything else runs (a data loader, another program), and results then depend on the number of cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise FileNotFoundError(
            f"expected the command {command[0]} to be installed, got none. Next step: pip install -e ."
        )
    with log.open("ab" if append else "wb") as file:
        process = terminal.start([program, *command[1:]], environment)
        assert process.stdout is not None
        try:
            while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
                file.write(chunk)
                terminal.show(chunk)
            return process.wait()
        except BaseException:
            # the terminal has already told the command; from elsewhere (kill) it has to be passed on
            interrupt(process)
            raise
