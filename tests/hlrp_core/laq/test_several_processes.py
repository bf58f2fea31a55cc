"""Several processes train one LAQ: batches of their own, one codebook, one writer.

They are forked, as starting Python anew would take most of the time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from hlrp_core.laq.config import QUANTIZERS, LAQConfig
from hlrp_core.laq.pairs import FrameTuples
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.laq.training import LAQTrainingConfig, train_laq

NUM_PROCESSES = 2
CONFIG = LAQTrainingConfig(steps=6, batch_size=16, log_freq=2, save_freq=2)

# Of the threads that Python warns of, none holds a lock that a child would wait for; if one did, it would be killed.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def work(rank: int, port: int, job: Callable[[int], None]) -> None:
    """One process, launched as `torch.distributed.run` would; exit status 1 where it fails."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES, "LOCAL_WORLD_SIZE": NUM_PROCESSES}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    try:
        job(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def launch(job: Callable[[int], None]) -> list[int | None]:
    """The exit status of each process."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that uses CUDA cannot be forked")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, port, job)) for rank in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def train(quantizer: str, tuples: tuple[FrameTuples, FrameTuples], folder: Path, *, kill_at: int | None = None):
    def job(rank: int) -> None:
        sample, seen = FrameTuples.sample, []

        def note(self: FrameTuples, batch_size: int, **where: int) -> torch.Tensor:
            if where["step"] == kill_at:
                os._exit(3)
            frames = sample(self, batch_size, **where)
            seen.append(hashlib.sha256(frames.numpy().tobytes()).hexdigest())
            return frames

        FrameTuples.sample = note  # in this process alone
        torch.manual_seed(rank)  # each starts with random weights of its own
        sizes = LAQConfig(image_size=32, hidden_dim=16, num_layers=1, frame_gap=1, code_seq_len=2, quantizer=quantizer)
        laq = LatentActionQuantizer(sizes)
        figures = train_laq(laq, *tuples, CONFIG, output_dir=folder)
        found = {"weights": laq.weights_hash(), "figures": figures, "seen": seen}
        (folder.with_name(f"{folder.name}-{rank}.json")).write_text(json.dumps(found))

    return launch(job)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_processes_train_one_laq(square_tuples, tmp_path, quantizer):
    tuples = tuple(pairs.spread(200) for pairs in square_tuples)
    assert train(quantizer, tuples, tmp_path / "laq") == [0, 0]
    first, second = (json.loads((tmp_path / f"laq-{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert first["figures"] == second["figures"] == json.loads((tmp_path / "laq" / "metrics.json").read_text())
    assert LatentActionQuantizer.from_pretrained(tmp_path / "laq").weights_hash() == first["weights"]
    assert not set(first["seen"]) & set(second["seen"])
    records = (tmp_path / "laq" / "run" / "metrics.jsonl").read_text()
    assert [json.loads(record)["step"] for record in records.splitlines()] == [2, 4, 6]

    killed = tmp_path / "killed"
    assert train(quantizer, tuples, killed, kill_at=3) == [3, 3]
    assert train(quantizer, tuples, killed) == [0, 0]
    assert LatentActionQuantizer.from_pretrained(killed).weights_hash() == first["weights"]
    assert (killed / "run" / "metrics.jsonl").read_text() == records
    alone = LatentActionQuantizer.from_pretrained(killed)
    with pytest.raises(ValueError, match=r"expected 2 process\(es\).* got 1. Next step"):
        train_laq(alone, *tuples, CONFIG, output_dir=killed)
