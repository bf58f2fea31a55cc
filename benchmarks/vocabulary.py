"""One stage-2 optimizer step: frozen vocabulary tables with trainable code rows, against training the whole tables.

    python benchmarks/vocabulary.py --output outputs/vocabulary.json

Both sides run the same backbone on the same batch: forward, backward, clipping of the gradient, AdamW. The vocabulary
is Qwen3-VL's, 151,936 rows. Rounds take turns; times are medians. Memory is what gradients and optimizer hold after a
step, and the peak of a step above that.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from measuring import describe_machine, extra_peak_bytes, interleaved_ms, print_table, write_result
from training_loss import ASSETS, INSTRUCTIONS, build, our_loss

from hlrp_core import FoundationBatch
from hlrp_core.backends.composed import ComposedBackend


class Step:
    """A training step of one backend on one batch, again and again."""

    def __init__(self, backend: ComposedBackend, batch: FoundationBatch):
        self.backend = backend
        self.batch = batch
        self.trained = [p for p in backend.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=1e-4)
        self()

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        our_loss(self.backend, self.batch).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    @property
    def held_bytes(self) -> int:
        """Gradients and the optimizer's moments."""
        held = [x for state in self.optimizer.state.values() for x in state.values()]
        held += [p.grad for p in self.trained if p.grad is not None]
        return sum(x.numel() * x.element_size() for x in held)


def measure(size: str, args: argparse.Namespace) -> dict:
    rng = torch.Generator().manual_seed(0)
    B, S, K = args.batch_size, args.code_seq_len, args.codebook_size
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (B, 1, *args.image, 3), generator=rng, dtype=torch.uint8),
        instructions=[INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(B)],
        target_codes=torch.randint(0, K, (B, S), generator=rng),
    )
    sizes = {"code_seq_len": S, "codebook_size": K}
    backends = {name: build("qwen_chat", size, args.processors, **sizes) for name in ("all", "code_rows")}
    rows = backends["code_rows"]
    rows.core.train_code_rows(rows.code_head.vocabulary.ids)
    steps = {name: Step(backend, batch) for name, backend in backends.items()}
    times = interleaved_ms(dict(steps), rounds=args.rounds)
    gc.collect()
    result: dict = {"vocabulary": steps["all"].backend.core.lm_head.weight.shape[0], "batch_size": B}
    for name, step in steps.items():
        result |= {
            f"{name}_ms": times[name],
            f"{name}_held_mb": round(step.held_bytes / 2**20, 1),
            f"{name}_extra_mb": round(extra_peak_bytes(step) / 2**20, 1),
        }
    for unit in ("ms", "held_mb", "extra_mb"):
        result[f"{unit}_ratio"] = round(result[f"all_{unit}"] / result[f"code_rows_{unit}"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny"], choices=["tiny", "small"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--code_seq_len", type=int, default=4)
    parser.add_argument("--codebook_size", type=int, default=8)
    parser.add_argument("--image", type=int, nargs=2, default=(96, 96), help="height and width of the frames")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--processors",
        type=Path,
        default=ASSETS,
        help="folder with the published processors, as in training_loss.py",
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = {size: measure(size, args) for size in args.sizes}
    rows = [[name, *(r[name] for r in results.values())] for name in next(iter(results.values()))]
    print_table(["", *results], rows)
    write_result({"machine": machine, "results": results}, args.output)


if __name__ == "__main__":
    main()
