"""Runs commands: what they print goes to their logs, and to the terminal; each interrupt reaches each of them once."""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PATIENCE_S = 60.0  # for a command that was interrupted to end; then it is killed


class Lane:
    """Commands that run one after another. Those of a lane in the background print to their logs alone.

    Args:
        visible: whether the terminal shows what they print.
    """

    def __init__(self, *, visible: bool = True):
        self.visible = visible
        self._process: subprocess.Popen | None = None
        self._interrupts = 0
        self._deadline = math.inf
        self._lock = threading.RLock()  # a signal handler may find its own thread within it

    @property
    def stopped(self) -> bool:
        return self._interrupts > 0

    def run(self, command: list[str], log: Path) -> int:
        """Run a command, appending what it prints to `log`; returns its exit status.

        Raises:
            KeyboardInterrupt: the lane was stopped before.
            FileNotFoundError: the command is not installed.
        """
        # Unbuffered: whoever looks into the log of a lane in the background wants to see what is happening now.
        with log.open("ab", buffering=0) as file:
            process = self._start(command)
            assert process.stdout is not None
            try:
                for chunk in self._read(process):
                    file.write(chunk)
                    self._show(chunk)
                return process.wait()
            except BaseException:
                self.stop()
                _wait(process)
                raise
            finally:
                process.stdout.close()
                with self._lock:
                    self._process = None

    def stop(self) -> None:
        """Let the lane's command save its state and end, and start no other. Again, it does nothing."""
        with self._lock:
            if not self.stopped:
                self.interrupt()

    def interrupt(self) -> None:
        """As `stop`, but the second time the command has to end at once, and the third time it is killed."""
        with self._lock:
            self._interrupts += 1
            self._deadline = min(self._deadline, time.monotonic() + PATIENCE_S)
            self._pass_on()

    def _start(self, command: list[str]) -> subprocess.Popen:
        # One thread unless the user wants more: models this small gain little from a second one, which also has to wait
        # whenever anything else runs (a data loader, another program), and results then depend on the number of cores.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        program = shutil.which(command[0], path=folders)
        if program is None:
            raise FileNotFoundError(
                f"expected the command {command[0]} to be installed, got none. Next step: pip install -e ."
            )
        with self._lock:
            if self.stopped:
                raise KeyboardInterrupt
            # A session of its own: Ctrl-C signals all processes of the terminal's group, and with the one that is
            # passed on the command would get two of them, where the second one means "without saving".
            self._process = subprocess.Popen(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            if self.stopped:  # by a signal handler of this thread, which saw no process yet
                self._pass_on()
            return self._process

    def _read(self, process: subprocess.Popen) -> Iterator[bytes]:
        """What the command prints, until it ends: what it leaves running may hold the pipe open for longer."""
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        while True:
            has_ended = process.poll() is not None
            if select.select([pipe], [], [], 0.0 if has_ended else 1.0)[0]:
                chunk = os.read(pipe, 65536)
                if not chunk:
                    return
                yield chunk
            elif has_ended:
                return
            if time.monotonic() > self._deadline:
                _kill(process)

    def _show(self, chunk: bytes) -> None:
        if self.visible and not self.stopped:  # the log alone gets the traceback of a command that was interrupted
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    def _pass_on(self) -> None:
        if self._process is None:
            return
        if self._interrupts <= 2:
            self._process.send_signal(signal.SIGINT)
        else:
            _kill(self._process)


def _wait(process: subprocess.Popen) -> None:
    """For its end, whatever it still prints."""
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its data loaders


@contextmanager
def interrupts_to(lanes: Iterable[Lane]) -> Iterator[None]:
    """Within the block an interrupt from the terminal or from elsewhere (SIGINT, SIGTERM, SIGHUP) goes to the lanes.

    What is ignored stays ignored, as under `nohup`.
    """
    lanes = list(lanes)

    def handle(_number: int, _frame: FrameType | None) -> None:
        if not any(lane.stopped for lane in lanes):
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(2, b"\nStopping; what can save its state does so first. Once more to stop at once.\n")
        for lane in lanes:
            lane.interrupt()

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        try:
            previous[number] = signal.signal(number, handle)
        except ValueError:  # not the main thread: there, interrupts are someone else's business
            break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
