"""Runs the demo's steps as the plain commands that a user can type, and picks up where it stopped.

A finished step leaves a marker with its command and the times of its runs; a step whose command has changed runs again,
and so does everything after it. An interrupted step is handed back to its own command, which continues or starts anew.
Branches that need nothing of each other run beside each other where there is a core for each.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hlrp_core.bundle import write_json
from lerobot_hlrp.demo.processes import Terminal, run_logged


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
        num_cores: that commands may use; by default all that this process has.
    """

    def __init__(self, folder: Path, *, num_cores: int | None = None):
        self.folder = folder
        self.markers = folder / "steps"
        self.logs = folder / "logs"
        self.num_cores = count_cores() if num_cores is None else num_cores
        self._titles: dict[str, str] = {}
        for path in (self.markers, self.logs):
            path.mkdir(parents=True, exist_ok=True)

    def run_all(self, steps: Sequence[Step], branches: Sequence[Sequence[Step]] = ()) -> None:
        """Args:
            steps: one after another.
            branches: then these. Each is in order; they need the steps and nothing of each other. With a core for each
                they run at once, and the terminal shows the first one, then what is left of the others.

        Raises:
            StepError: a command failed.
            KeyboardInterrupt: the user interrupted; the finished steps keep.
        """
        everything = [*steps, *(step for branch in branches for step in branch)]
        self._titles = {
            step.name: f"[{number}/{len(everything)}] {step.title}" for number, step in enumerate(everything, start=1)
        }
        terminal = Terminal()
        self._run_in_order(steps, terminal, then=everything[len(steps) :])
        threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
        if len(branches) > 1 and self.num_cores >= len(branches) * threads:
            self._run_beside(branches, terminal)
        else:
            for branch in branches:
                self._run_in_order(branch, terminal)

    def wall_s(self, step: Step) -> float:
        """Seconds that the step took, all its interrupted runs included."""
        return sum(end - start for start, end in self._read(step).get("runs", []))

    def total_s(self, steps: Iterable[Step]) -> float:
        """Seconds in which at least one of the steps was running."""
        total, covered_until = 0.0, 0.0
        for start, end in sorted(tuple(run) for step in steps for run in self._read(step).get("runs", [])):
            total += max(0.0, end - max(start, covered_until))
            covered_until = max(covered_until, end)
        return total

    def log_path(self, step: Step) -> Path:
        return self.logs / f"{step.name}.log"

    def _marker(self, step: Step) -> Path:
        return self.markers / f"{step.name}.json"

    def _read(self, step: Step) -> dict:
        marker = self._marker(step)
        return json.loads(marker.read_text()) if marker.is_file() else {}

    def _run_beside(self, branches: Sequence[Sequence[Step]], terminal: Terminal) -> None:
        first, *others = branches
        hidden = [Terminal(visible=False) for _ in others]
        with ThreadPoolExecutor(len(others)) as threads:
            futures = [
                threads.submit(self._run_in_order, branch, its_terminal)
                for branch, its_terminal in zip(others, hidden, strict=True)
            ]
            try:
                self._run_in_order(first, terminal)
                for future, its_terminal in zip(futures, hidden, strict=True):
                    its_terminal.visible = True
                    future.result()
            except BaseException:
                for its_terminal in hidden:
                    its_terminal.stop()
                raise

    def _run_in_order(self, steps: Sequence[Step], terminal: Terminal, *, then: Sequence[Step] = ()) -> None:
        """Args:
        then: further steps that need these.
        """
        for number, step in enumerate(steps, start=1):
            beside = "" if terminal.visible else f" (beside the others; it prints to {self.log_path(step)})"
            print(f"\n\033[1m{self._titles[step.name]}\033[0m{beside}\n  {shlex.join(step.command)}", flush=True)
            if self._is_done(step):
                print(f"  done before, in {self.wall_s(step):.0f} s")
                continue
            for later in (*steps[number:], *then):  # made from what is about to change; an interrupt must not hide it
                self._marker(later).unlink(missing_ok=True)
            self._run(step, terminal)

    def _is_done(self, step: Step) -> bool:
        seen = self._read(step)
        return bool(seen.get("done")) and seen.get("command") == step.command

    def _run(self, step: Step, terminal: Terminal) -> None:
        before = self._read(step)
        continues = bool(before) and not before.get("done") and before.get("command") == step.command
        continued = step.resume() if continues else None
        command = continued or step.command
        if continued is None:
            _delete(step.output)
        if command != step.command:
            print(f"  continuing: {shlex.join(command)}", flush=True)
        runs = before.get("runs", []) if continues else []
        start = time.time()
        write_json(self._marker(step), {"command": step.command, "done": False, "runs": runs})
        code = -1
        try:
            code = run_logged(command, self.log_path(step), terminal=terminal, append=continues)
        except FileNotFoundError as error:
            raise StepError(str(error)) from error
        finally:
            runs = [*runs, [start, time.time()]]
            write_json(self._marker(step), {"command": step.command, "done": code == 0, "runs": runs})
        if code != 0 and not terminal.stopped:
            raise StepError(
                f"step '{step.name}': expected its command to succeed, got exit status {code}. "
                f"Next step: read {self.log_path(step)}, then run the same demo command again; finished steps are kept."
            )
        if code != 0:
            raise KeyboardInterrupt


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
