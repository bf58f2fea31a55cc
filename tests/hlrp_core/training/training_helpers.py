"""What the tests of training share."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.contract import FoundationBatch
from hlrp_core.training import CodeTrainingConfig

CONFIG = CodeTrainingConfig(steps=6, lr=1e-3, warmup_steps=2, log_freq=2, eval_freq=3, save_freq=2, seed=3)


def make_batches(backend, count: int = 4, **settings) -> list[FoundationBatch]:
    return [fake_batch(backend, image_side=24, seed=i, **settings) for i in range(count)]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "samples_per_s"} for record in records]


class Power:
    """Batches that end a run from within: a failure, or a signal, before batch number `after`."""

    def __init__(self, batches, after: int, signal_number: int | None = None):
        self.batches, self.after, self.signal_number = batches, after, signal_number
        self.read = 0

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.after:
                if self.signal_number is None:
                    raise RuntimeError("power failure")
                os.kill(os.getpid(), self.signal_number)
            self.read += 1
            yield batch
