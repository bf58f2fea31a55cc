"""Latency of decoding codes: constrained over the cache, against its floor and against Hugging Face's `generate`.

    python benchmarks/decoding.py --output outputs/decoding.json

The floor is what no decoder of S codes can go below: the vision tower and the prefill of the prompt, then S - 1 steps
of one token over the cache, with no vocabulary projection at all. All of them get the same encoded prompts and take
turns; `constrained` and `generate` give the same codes (checked). `generate` is timed with the package's kernels for
linear layers and, as `generate_torch`, with torch's own, as it runs without this package. `whole` is
`latent_from_batch`: image processing, prompts and constrained decoding. Times are medians in milliseconds, on one
thread.

Each size is measured with the small vocabulary of a random checkpoint and with as many rows as the family's published
models have: `generate` projects onto all of them in every step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from measuring import describe_machine, interleaved_ms, print_table, write_result

from hlrp_core import BackendMode, FoundationBatch, SamplingOptions, make_backend
from hlrp_core.backbones.cpu_linear import speed_up_linears, torch_kernels
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.codes.decoding import make_decoder
from hlrp_core.prompting.strategy import PromptInputs
from hlrp_core.registry import get_recipe

INSTRUCTIONS = ("reach the red disc", "push the green block to the blue corner, slowly", "open the top drawer", "stop")
CODES = ((4, 8), (8, 256))  # S, K
PUBLISHED_ROWS = {"qwen3_vl": 151_936, "smolvlm": 49_280}


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


def build(name: str, folder: Path, vocabulary: int | None, *, code_seq_len: int, codebook_size: int) -> ComposedBackend:
    torch.manual_seed(0)
    backend = make_backend(name, backbone=folder, code_seq_len=code_seq_len, codebook_size=codebook_size)
    if vocabulary is not None:
        backend.core.model.resize_token_embeddings(vocabulary, mean_resizing=False)
        speed_up_linears(backend)  # of the new projection, too
        backend.setup(device=torch.device("cpu"))
    sharpen(backend)
    return backend.eval()


def run_on_torch_kernels(function: Callable[[], object]) -> None:
    with torch_kernels():
        function()


def measure(backend: ComposedBackend, batch_size: int, rounds: int) -> dict:
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (batch_size, 1, 96, 96, 3), dtype=torch.uint8),
        instructions=[INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(batch_size)],
    )
    inputs = backend._prompt(batch, for_prediction=True)
    decoders = {name: make_decoder(name, backend.code_head.vocabulary) for name in ("constrained", "generate")}
    with torch.no_grad():
        codes = [decoder.decode(backend.core, inputs, SamplingOptions()).tokens for decoder in decoders.values()]
        assert torch.equal(*codes), "the two decoders differ"

        def generate() -> None:
            decoders["generate"].decode(backend.core, inputs, SamplingOptions())

        times = interleaved_ms(
            {
                "floor": lambda: run_floor(backend, inputs),
                "constrained": lambda: decoders["constrained"].decode(backend.core, inputs, SamplingOptions()),
                "generate": generate,
                "generate_torch": lambda: run_on_torch_kernels(generate),
                "whole": lambda: backend.latent_from_batch(batch, mode=BackendMode.CODES),
            },
            rounds=rounds,
            warmup=3,
        )
    return {
        "vocabulary": backend.core.lm_head.weight.shape[0],
        "prompt_tokens": inputs.tokens.ids.shape[1],
        **{f"{name}_ms": value for name, value in times.items()},
        "constrained_over_floor": round(times["constrained"] / times["floor"], 2),
        "generate_over_constrained": round(times["generate"] / times["constrained"], 2),
        "generate_torch_over_constrained": round(times["generate_torch"] / times["constrained"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["qwen_chat", "smol_chat"])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=["tiny", "small"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = []
    with tempfile.TemporaryDirectory() as name:
        for backend_name, size in product(args.backends, args.sizes):
            family = get_recipe(backend_name).family
            folder = Path(name) / f"{family}_{size}"
            if not folder.is_dir():
                write_random_checkpoint(folder, family=family, size=size)
            # None: the checkpoint's own vocabulary
            for vocabulary, batch_size, (S, K) in product((None, PUBLISHED_ROWS[family]), args.batch_sizes, CODES):
                backend = build(backend_name, folder, vocabulary, code_seq_len=S, codebook_size=K)
                figures = measure(backend, batch_size, args.rounds)
                results.append({"backend": backend_name, "size": size, "batch": batch_size, "S": S, "K": K, **figures})
    print_table(list(results[0]), [list(result.values()) for result in results])
    write_result({"machine": machine, "results": results}, args.output)


if __name__ == "__main__":
    main()
