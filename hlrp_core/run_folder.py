"""The folder of a training run: checkpoints that appear whole, metrics as JSON lines, settings that must not change.

    settings.json                     what the run was started with
    metrics.jsonl                     one record a line
    checkpoints/000500/               one checkpoint; what is in it is the run's own business
    checkpoints/last                  link to the newest

The same command run again continues from the newest checkpoint. Nothing in here knows what is trained, so that every
stage can use it.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LAST = "last"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that is renamed to `folder` when the block ends well, and deleted when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        scratch.chmod(0o755)
        yield scratch
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write under a temporary name, then rename. JSON has no NaN and no infinity: `null` takes their place."""
    _replace_text(path, json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    """`data` with None for every number that is not finite."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def _replace_text(path: Path, text: str) -> None:
    # Processes of one run may write the same file at once, and on several machines their numbers may be equal.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _is_scratch_of(path: Path, name: str) -> bool:
    return path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class RunFolder:
    """A new run, or the continuation of one with the same settings. The processes of one run may all build it, at once.

    Args:
        folder: of the run.
        settings: plain JSON; whatever decides the result of the run.
        keep: how many checkpoints stay; 0 for all.

    Raises:
        ValueError: the folder holds a run with other settings, or files of something else.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], *, keep: int = 0):
        self.folder = Path(folder)
        self.keep = keep
        self._check(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS, settings)

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS
        # Looked at before the settings are: another process of this run may be writing them right now, and nothing
        # else appears in the folder before they are there.
        is_taken = self._is_taken()
        if path.is_file():
            before, now = _finite(read_json(path)), json.loads(json.dumps(_finite(settings)))
            differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if differing:
                raise ValueError(
                    f"{self.folder}: expected the settings with which its run was started ("
                    f"{', '.join(f'{name}={before.get(name)!r}' for name in differing)}), got "
                    f"{', '.join(f'{name}={now.get(name)!r}' for name in differing)}. Next step: repeat the command "
                    "with the old settings to continue that run, or name another folder."
                )
        elif is_taken:
            raise ValueError(
                f"{self.folder}: expected a new or empty folder, or one with an earlier run, got something else. "
                "Next step: name another folder."
            )

    def _is_taken(self) -> bool:
        """Whether anything is there but settings that are being written, or that a killed process was writing."""
        if not self.folder.exists():  # first: another process may make it at any moment
            return False
        return not self.folder.is_dir() or any(not _is_scratch_of(path, SETTINGS) for path in self.folder.iterdir())

    @property
    def last(self) -> Path:
        """Link to the newest checkpoint."""
        return self.folder / CHECKPOINTS / LAST

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        done = self._checkpoints()
        return done[-1] if done else None

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / CHECKPOINTS
        if not folder.is_dir():
            return []
        return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A scratch folder that becomes the newest checkpoint when the block ends well."""
        target = self.folder / CHECKPOINTS / f"{step:06d}"
        with new_folder(target) as scratch:
            yield scratch
        self._point_last_to(target)
        for old in self._checkpoints()[: -self.keep] if self.keep else []:
            shutil.rmtree(old)

    def _point_last_to(self, checkpoint: Path) -> None:
        link = checkpoint.with_name(f".{LAST}.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(self.last)

    def repair_last(self) -> None:
        """Point `last` to the newest checkpoint: a run that was killed just after writing that one has not.

        For one process of the run alone.
        """
        newest = self.latest_checkpoint()
        if newest is None or (self.last.exists() and not self.last.is_symlink()):  # a copy may have a folder there
            return
        if not self.last.exists() or self.last.readlink() != Path(newest.name):
            self._point_last_to(newest)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to the metrics, with `null` as in `write_json`; it is on disk when this returns."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the records of steps after `step`: a killed run measured them, and its continuation will again."""
        path = self.folder / METRICS
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while writing it
                continue
            if record.get("step", 0) <= step:
                kept.append(line + "\n")
        _replace_text(path, "".join(kept))


# -- state of a training run as safetensors and JSON: no pickle --------------------------------------------------------


def save_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Write `optimizer.safetensors` and `optimizer.json`."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value.cpu().contiguous()
            else:
                plain[f"{index}/{name}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    write_json(folder / "optimizer.json", {"param_groups": state["param_groups"], "state": plain})


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Inverse of `save_optimizer`, for an optimizer of the same parameters."""
    saved = read_json(folder / "optimizer.json")
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**load_file(folder / "optimizer.safetensors"), **saved["state"]}.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    groups = [  # JSON has no tuples
        {name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()}
        for group in saved["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def capture_random_state() -> dict[str, Any]:
    """The state of this process's global random generators: torch (CPU and current CUDA device), numpy, Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - others may draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of `capture_random_state`; the current CUDA device may be another one, or none."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def save_random_state(state: dict[str, Any], folder: Path, *, name: str = "random") -> None:
    """Write `<name>.safetensors` and `<name>.json`."""
    tensors = {key: state[key] for key in ("torch", "cuda") if state[key] is not None}
    save_file(tensors, folder / f"{name}.safetensors")
    write_json(folder / f"{name}.json", {"numpy": state["numpy"], "python": state["python"]})


def load_random_state(folder: Path, *, name: str = "random") -> dict[str, Any]:
    """Inverse of `save_random_state`.

    Raises:
        ValueError: the file is of an earlier version, which wrote the states of all CUDA devices.
    """
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    unknown = sorted(tensors.keys() - {"torch", "cuda"})
    if unknown:
        raise ValueError(
            f"{path}: expected the random states torch and cuda, got {', '.join(unknown)}, as an earlier version of "
            "this package wrote them. Next step: continue the run with that version, or start a new one."
        )
    return {"torch": tensors["torch"], "cuda": tensors.get("cuda"), **read_json(folder / f"{name}.json")}


class StopRequest:
    """Turns the first interrupt (SIGINT, SIGTERM) within its block into `requested`, to be honoured between two steps.

    The second one acts as usual.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._handlers[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: there, interrupts are someone else's business
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        self._restore()
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")
