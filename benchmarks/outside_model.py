"""How much of a stage-2 training step is spent outside the model, at batch 8.

    python benchmarks/outside_model.py --output benchmarks/results/outside_model.json

Outside is all but the backbone's forward, the loss on its hidden states, backward and AdamW: processing images,
building and tokenising prompts, position ids, labels, checks, metrics. Every step gets a batch of new images. `known`
steps repeat instructions, as an epoch does; in `new` ones each instruction is seen for the first time. Counted in the
same steps: calls of the image processor, images that it was given, positions and vision tables that were computed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, print_table, write_result

from hlrp_core import BackendMode, FoundationBatch, make_backend
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.registry import get_recipe

COLOURS = ("red", "green", "blue", "yellow")
WARMUP = 3  # steps, in which every known instruction is seen
THINGS = ("disc", "block", "ring", "star", "cup")


class Probe:
    """Wraps methods of the running model: `seconds` inside them, and how often they were called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counts: Counter[str] = Counter()

    def time(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def count(self, owner: Any, name: str, what: str, amount: Callable[..., int] = lambda *_: 1) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[what] += amount(*args)
            return function(*args, **kwargs)

        setattr(owner, name, counted)


def probe(backend: ComposedBackend) -> Probe:
    core, found = backend.core, Probe()
    found.time(core, "forward")
    found.time(backend.code_head, "loss")
    found.count(core, "images_for_processor", "processor_calls")
    found.count(core, "images_for_processor", "images_processed", lambda images, _: len(images))
    found.count(core, "build_positions", "position_ids_built")
    if hasattr(core, "encode_images"):  # SmolVLM: its one table is made with the core
        return found
    found.count(core.model.model.visual, "_interpolation_table", "vision_tables_built")  # type: ignore[union-attr]
    return found


def make_batch(size: int, number: int, instruct: Callable[[int], str]) -> FoundationBatch:
    rng = torch.Generator().manual_seed(number)
    return FoundationBatch(
        frames=torch.randint(0, 256, (size, 1, 96, 96, 3), generator=rng, dtype=torch.uint8),
        instructions=[instruct(number * size + row) for row in range(size)],
        target_codes=torch.randint(0, 8, (size, 4), generator=rng),
    )


INSTRUCTIONS: dict[str, Callable[[int], str]] = {
    "known": lambda n: f"push the {COLOURS[n % 4]} {THINGS[n % 5]} to the corner",
    "new": lambda n: f"push the {COLOURS[n % 4]} {THINGS[n % 5]} {n} steps to the corner",
}


def measure(folder: Path, name: str, which: str, batch_size: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    backend = make_backend(name, backbone=folder, codebook_size=8, code_seq_len=4)
    backend.setup(device=torch.device("cpu"))
    backend.train()
    optimizer = torch.optim.AdamW(backend.parameters(), lr=1e-4)
    found = probe(backend)
    steps: list[tuple[float, float]] = []
    for number in range(WARMUP + rounds):
        if number == WARMUP:
            found.counts.clear()
        batch = make_batch(batch_size, number, INSTRUCTIONS[which])
        found.seconds, start = 0.0, time.perf_counter()
        loss = backend.loss_from_batch(batch, mode=BackendMode.CODES).loss
        outside = time.perf_counter() - start - found.seconds
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append((outside, time.perf_counter() - start))
    outside, whole = (statistics.median(times) for times in zip(*steps[WARMUP:], strict=True))
    counts = ("processor_calls", "images_processed", "position_ids_built", "vision_tables_built")
    return {
        "backend": name,
        "instructions": which,
        "batch_size": batch_size,
        "step_ms": round(1e3 * whole, 2),
        "outside_ms": round(1e3 * outside, 2),
        "outside_share": round(outside / whole, 3),
        **{f"{what}_per_step": found.counts[what] / rounds for what in counts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["qwen_chat", "smol_chat"])
    parser.add_argument("--size", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = []
    with tempfile.TemporaryDirectory() as name:
        for backend in args.backends:
            family = get_recipe(backend).family
            folder = write_random_checkpoint(Path(name) / backend, family=family, size=args.size)
            results += [measure(folder, backend, which, args.batch_size, args.rounds) for which in INSTRUCTIONS]
    header = ["", *(str(number + 1) for number in range(len(results)))]
    print_table(header, [[key, *(row[key] for row in results)] for key in results[0]])
    write_result({"machine": machine, "size": args.size, "results": results}, args.output)


if __name__ == "__main__":
    main()
