"""Latency of decoding codes: constrained over the cache, against its floor and against Hugging Face's `generate`.

    python benchmarks/decoding.py --output outputs/decoding.json

The floor is what no decoder of S codes can go below: the vision tower and the prefill of the prompt, then S - 1 steps
of one token over the cache, with no vocabulary projection at all. All three get the same encoded prompts and take
turns; `constrained` and `generate` give the same codes (checked). `whole` is `latent_from_batch`: image processing,
prompts and constrained decoding. Times are medians in milliseconds, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from measuring import describe_machine, interleaved_ms, print_table, write_result

from hlrp_core import BackendMode, FoundationBatch, SamplingOptions, make_backend
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.prompting.strategy import PromptInputs

INSTRUCTIONS = ("reach the red disc", "push the green block to the blue corner, slowly", "open the top drawer", "stop")
CODES = ((4, 8), (8, 256))  # S, K


def run_floor(backend: ComposedBackend, inputs: PromptInputs) -> None:
    tokens = inputs.tokens
    _, cache = backend.core(tokens, inputs.images, use_cache=True)
    for _ in range(backend.code_seq_len - 1):
        tokens = tokens.continuation(tokens.ids[:, -1:])
        backend.core(tokens, cache=cache)


def sharpen(backend: ComposedBackend) -> None:
    """Code rows that differ, so that the best code is no coin toss on random weights."""
    rows = backend.code_head.vocabulary.code_ids
    with torch.no_grad():
        backend.core.lm_head.weight[rows] += torch.randn(len(rows), backend.core.hidden_dim)


def measure(folder: Path, batch_size: int, code_seq_len: int, codebook_size: int, rounds: int) -> dict:
    sizes = {"code_seq_len": code_seq_len, "codebook_size": codebook_size}
    torch.manual_seed(0)
    backend = make_backend("qwen_chat", backbone=folder, **sizes).eval()
    sharpen(backend)
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (batch_size, 1, 96, 96, 3), dtype=torch.uint8),
        instructions=[INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch_size)],
    )
    inputs = backend._prompt(batch, for_prediction=True)
    decoders = {name: make_decoder(name, backend.code_head.vocabulary) for name in ("constrained", "generate")}
    with torch.no_grad():
        codes = [decoder.decode(backend.core, inputs, SamplingOptions()).tokens for decoder in decoders.values()]
        assert torch.equal(*codes), "the two decoders differ"
        times = interleaved_ms(
            {
                "floor": lambda: run_floor(backend, inputs),
                "constrained": lambda: decoders["constrained"].decode(backend.core, inputs, SamplingOptions()),
                "generate": lambda: decoders["generate"].decode(backend.core, inputs, SamplingOptions()),
                "whole": lambda: backend.latent_from_batch(batch, mode=BackendMode.CODES),
            },
            rounds=rounds,
            warmup=3,
        )
    return {
        "prompt_tokens": inputs.tokens.ids.shape[1],
        **{f"{name}_ms": value for name, value in times.items()},
        "constrained_over_floor": round(times["constrained"] / times["floor"], 2),
        "generate_over_constrained": round(times["generate"] / times["constrained"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=["tiny", "small"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = []
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes:
            folder = write_random_checkpoint(Path(name) / size, size=size)
            for batch_size in args.batch_sizes:
                for code_seq_len, codebook_size in CODES:
                    figures = measure(folder, batch_size, code_seq_len, codebook_size, args.rounds)
                    case = {"size": size, "batch": batch_size, "S": code_seq_len, "K": codebook_size}
                    results.append({**case, **figures})
    print_table(list(results[0]), [list(result.values()) for result in results])
    write_result({"machine": machine, "results": results}, args.output)


if __name__ == "__main__":
    main()
