"""Runs the demo's steps as the plain commands that a user can type, and picks up where it stopped.

A finished step leaves a marker with its command and the times of its runs; a step whose command has changed, or whose
output is gone, runs again, and so does everything after it. An interrupted step is handed back to its own command,
which continues or starts anew. Branches that need nothing of each other run beside each other where there is a core for
each.
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

from hlrp_core.run_folder import write_json
from lerobot_hlrp.demo.processes import Lane, interrupts_to

# In the log of a step that goes on after an interrupt, with the training step from which it does where there is one.
CONTINUED = "hlrp-demo: continued"


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
        reached: the training step from which `resume` goes on; None for what has none.
    """

    name: str
    title: str
    command: list[str]
    output: Path
    resume: Callable[[], list[str] | None] = field(default=lambda: None)
    reached: Callable[[], int | None] = field(default=lambda: None)


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
            KeyboardInterrupt: the user interrupted, and the commands have ended; the finished steps keep.
        """
        everything = [*steps, *(step for branch in branches for step in branch)]
        self._titles = {
            step.name: f"[{number}/{len(everything)}] {step.title}" for number, step in enumerate(everything, start=1)
        }
        front, *hidden = lanes = [Lane(), *(Lane(visible=False) for _ in branches[1:])]
        threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
        with interrupts_to(lanes):
            self._run_in_order(steps, front, then=everything[len(steps) :])
            if hidden and self.num_cores >= len(branches) * threads:
                self._run_beside(branches, front, hidden)
            else:
                for branch in branches:
                    self._run_in_order(branch, front)
        if front.stopped:  # in the very last command, which has ended well for all that
            raise KeyboardInterrupt

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

    def _run_beside(self, branches: Sequence[Sequence[Step]], front: Lane, hidden: Sequence[Lane]) -> None:
        first, *others = branches
        with ThreadPoolExecutor(len(others)) as threads:
            futures = [
                threads.submit(self._run_in_order, branch, lane) for branch, lane in zip(others, hidden, strict=True)
            ]
            try:
                self._run_in_order(first, front)
                for future, lane in zip(futures, hidden, strict=True):
                    lane.visible = True
                    future.result()
            except BaseException:
                for lane in hidden:
                    lane.stop()
                raise

    def _run_in_order(self, steps: Sequence[Step], lane: Lane, *, then: Sequence[Step] = ()) -> None:
        """Args:
        then: further steps that need these.
        """
        for number, step in enumerate(steps, start=1):
            beside = "" if lane.visible else f" (beside the others; it prints to {self.log_path(step)})"
            print(f"\n\033[1m{self._titles[step.name]}\033[0m{beside}\n  {shlex.join(step.command)}", flush=True)
            if self._is_done(step):
                print(f"  done before, in {self.wall_s(step):.0f} s")
                continue
            for later in (*steps[number:], *then):  # made from what is about to change; an interrupt must not hide it
                self._marker(later).unlink(missing_ok=True)
            self._run(step, lane)

    def _is_done(self, step: Step) -> bool:
        seen = self._read(step)
        return bool(seen.get("done")) and seen.get("command") == step.command and step.output.exists()

    def _run(self, step: Step, lane: Lane) -> None:
        before = self._read(step)
        continues = bool(before) and not before.get("done") and before.get("command") == step.command
        continued = step.resume() if continues else None
        command = continued or step.command
        log = self.log_path(step)
        if continued is None:
            _delete(step.output)
            log.unlink(missing_ok=True)
        else:
            _note_continuation(log, step.reached())
        if command != step.command:
            print(f"  continuing: {shlex.join(command)}", flush=True)
        runs = before.get("runs", []) if continues else []
        start = time.time()
        write_json(self._marker(step), {"command": step.command, "done": False, "runs": runs})
        code = -1
        try:
            code = lane.run(command, log)
        except FileNotFoundError as error:
            raise StepError(str(error)) from error
        finally:
            runs = [*runs, [start, time.time()]]
            write_json(self._marker(step), {"command": step.command, "done": code == 0, "runs": runs})
        if code != 0 and not lane.stopped:
            raise StepError(
                f"step '{step.name}': expected its command to succeed, got exit status {code}. "
                f"Next step: read {log}, then run the same demo command again; finished steps are kept."
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


def _note_continuation(log: Path, step: int | None) -> None:
    """What was logged beyond `step` will be logged again; whoever reads the log has to know."""
    with log.open("a", encoding="utf-8") as file:  # the line before may be that of a killed process, or a progress bar
        file.write(f"\n{CONTINUED}\n" if step is None else f"\n{CONTINUED} from step {step}\n")
