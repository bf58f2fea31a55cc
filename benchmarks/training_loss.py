"""One stage-2 training step: vocabulary projection where a label is, against full `[B, L, V]` logits.

    python benchmarks/training_loss.py --output outputs/training_loss.json

Both sides run the same backbone on the same batch, forward and backward, and give the same loss and gradients
(printed). The reference projects every position onto the vocabulary and takes transformers' own loss of causal
language models, with labels of -100 on the prompt, by torch's own kernels; ours multiplies with oneDNN's, and is timed
by torch's own, too (`ours_torch`). The two losses are also measured alone, from hidden states that are computed once:
that is where the sides differ, and the backbone is no part of it. Prompts are those of the family's published
processor, where it is at hand. The vocabulary has as many rows as the family's published models, 151,936 in Qwen3-VL
and 49,280 in SmolVLM2, or a few more where the code tokens need them. Every token backend is measured; SmolVLM's on one
size of picture, as it scales each to one tile. Rounds take turns; times are medians, of steps that begin without
gradients, as a trainer's do. Memory is the peak of a step above what weights, gradients and batch take anyway.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from measuring import describe_machine, extra_peak_bytes, interleaved_ms, print_table, write_result
from torch import Tensor

from hlrp_core import BackendMode, FoundationBatch, make_backend
from hlrp_core.backbones.cpu_linear import torch_kernels
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.backbones.token_batch import TokenBatch
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.heads.action_head import PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding
from hlrp_core.registry import get_recipe

VOCABULARIES = {"qwen3_vl": 151_936, "smolvlm": 49_280}  # rows of the published models
ASSETS = Path(__file__).parents[2] / "shared" / "assets"
PROCESSORS = {"qwen3_vl": "qwen3_vl", "smolvlm": "smolvlm2_500m"}  # folders of the published ones there
BACKENDS = ("qwen_chat", "qwen_plain", "smol_chat", "smol_plain")
INSTRUCTIONS = ("reach the red disc", "push the green block to the blue corner, slowly", "open the top drawer", "stop")


def build(name: str, size: str, processors: Path, *, code_seq_len: int, codebook_size: int) -> ComposedBackend:
    family = get_recipe(name).family
    processor = processors / PROCESSORS[family]
    with tempfile.TemporaryDirectory() as folder:
        backbone = write_random_checkpoint(
            Path(folder) / "backbone", family=family, size=size, processor=processor if processor.is_dir() else None
        )
        backend = make_backend(name, backbone=backbone, code_seq_len=code_seq_len, codebook_size=codebook_size)
    if backend.core.lm_head.out_features < VOCABULARIES[family]:  # as many rows as the published model has
        backend.core.model.resize_token_embeddings(VOCABULARIES[family], mean_resizing=False)
    backend.setup(device=torch.device("cpu"))
    return backend.train()


def encode(backend: ComposedBackend, batch: FoundationBatch) -> tuple[Tensor, Tensor, TokenBatch]:
    """Hidden states `[B, L, W]` of prompt and completion, completion ids `[B, N]`, and the prompt."""
    inputs = backend._prompt(batch, for_prediction=False)
    completion = backend.code_head.completion(batch.target_codes.to(backend.core.device))
    hidden, _ = backend.core(inputs.tokens.append(completion), inputs.images)
    return hidden, completion, inputs.tokens


def loss_of_full_logits(backend: ComposedBackend, hidden: Tensor, completion: Tensor) -> Tensor:
    logits = backend.core.lm_head(hidden)  # (B, L, V)
    labels = torch.full(hidden.shape[:2], -100, device=hidden.device)
    labels[:, -completion.shape[1] :] = completion  # prompts are padded left
    return backend.core.model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])


def full_logits_loss(backend: ComposedBackend, batch: FoundationBatch) -> Tensor:
    """The plain computation, on the same backbone."""
    hidden, completion, _ = encode(backend, batch)
    return loss_of_full_logits(backend, hidden, completion)


def our_loss(backend: ComposedBackend, batch: FoundationBatch) -> Tensor:
    return backend.loss_from_batch(batch, mode=BackendMode.CODES).loss


def losses_alone(backend: ComposedBackend, batch: FoundationBatch) -> dict[str, Callable[[], Tensor]]:
    """Both losses of the same hidden states; their gradients end at the states and the vocabulary."""
    with torch.no_grad():
        hidden, completion, prompt = encode(backend, batch)
    hidden.requires_grad_()

    def ours() -> Tensor:
        at_labels = hidden[:, prompt.ids.shape[1] - 1 : -1]  # prompts are padded left
        encoding = BackboneEncoding(PrefixEncoding(hidden, prompt.valid_mask), prompt, at_labels)
        return backend.code_head.loss(backend.core, encoding, batch.target_codes).per_sample.mean()

    return {"ours": ours, "full": lambda: loss_of_full_logits(backend, hidden, completion)}


def difference(backend: ComposedBackend, batch: FoundationBatch) -> dict[str, float]:
    """Of the two losses, and of the gradients relative to the largest of them."""
    losses, gradients = [], []
    for loss in (our_loss, full_logits_loss):
        backend.zero_grad()
        value = loss(backend, batch)
        value.backward()
        losses.append(value.item())
        gradients.append([p.grad.clone() for p in backend.parameters() if p.grad is not None])
    largest = max(float(grad.abs().max()) for grad in gradients[1])
    apart = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    return {"loss_difference": abs(losses[0] - losses[1]), "gradient_difference": apart / largest}


def measure(name: str, size: str, image: tuple[int, int], args: argparse.Namespace) -> dict:
    sizes = {"code_seq_len": args.code_seq_len, "codebook_size": args.codebook_size}
    backend = build(name, size, args.processors, **sizes)
    rng = torch.Generator().manual_seed(0)
    B, S, K = args.batch_size, args.code_seq_len, args.codebook_size
    batch = FoundationBatch(
        frames=torch.randint(0, 256, (B, 1, *image, 3), generator=rng, dtype=torch.uint8),
        instructions=[INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(B)],
        target_codes=torch.randint(0, K, (B, S), generator=rng),
    )
    result: dict = difference(backend, batch)
    whole = {"ours": lambda: our_loss(backend, batch), "full": lambda: full_logits_loss(backend, batch)}
    alone = losses_alone(backend, batch)

    def step(loss: Callable[[], Tensor]) -> None:
        backend.zero_grad()  # as a trainer does
        loss().backward()

    def step_on_torch_kernels() -> None:
        with torch_kernels():
            step(whole["ours"])

    def memory_of_step(loss: Callable[[], Tensor]) -> float:
        step(loss)  # leaves gradients behind, to which the step that counts adds
        return extra_peak_bytes(lambda: loss().backward()) / 2**20

    times = interleaved_ms(
        {
            "ours": lambda: step(whole["ours"]),
            "ours_torch": step_on_torch_kernels,
            "full": lambda: step(whole["full"]),
        },
        rounds=args.rounds,
    )
    times_alone = interleaved_ms({name: partial(step, loss) for name, loss in alone.items()}, rounds=args.rounds)
    memory = {name: memory_of_step(loss) for name, loss in whole.items()}
    memory_alone = {name: memory_of_step(loss) for name, loss in alone.items()}
    tokens = backend._prompt(batch, for_prediction=False).tokens
    config = backend.core.model.config.text_config
    return {
        "backend": name,
        "size": size,
        "image": f"{image[0]}x{image[1]}",
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": backend.core.lm_head.weight.shape[0],
        "batch_size": B,
        "prompt_tokens": tokens.ids.shape[1],
        "completion_tokens": backend.code_head.completion(batch.target_codes).shape[1],
        "ours_ms": times["ours"],
        "ours_torch_ms": times["ours_torch"],
        "full_ms": times["full"],
        "time_ratio": round(times["full"] / times["ours"], 2),
        "time_ratio_torch": round(times["full"] / times["ours_torch"], 2),
        "ours_extra_mb": round(memory["ours"], 1),
        "full_extra_mb": round(memory["full"], 1),
        "memory_ratio": round(memory["full"] / memory["ours"], 2),
        "ours_alone_ms": times_alone["ours"],
        "full_alone_ms": times_alone["full"],
        "time_ratio_alone": round(times_alone["full"] / times_alone["ours"], 2),
        "ours_alone_extra_mb": round(memory_alone["ours"], 1),
        "full_alone_extra_mb": round(memory_alone["full"], 1),
        "memory_ratio_alone": round(memory_alone["full"] / memory_alone["ours"], 2),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--sizes", nargs="+", default=["tiny"], choices=["tiny", "small"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--code_seq_len", type=int, default=4)
    parser.add_argument("--codebook_size", type=int, default=8)
    parser.add_argument(
        "--images",
        nargs="+",
        type=lambda text: tuple(int(part) for part in text.split("x")),
        default=[(96, 96), (240, 320), (480, 640)],
        help="height x width of the frames, such as 480x640; the processor scales small ones up",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--processors",
        type=Path,
        default=ASSETS,
        help="folder that holds the published processors, each in its own; where one is missing, a small one stands in",
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = []
    for name, size in product(args.backends, args.sizes):
        images = args.images if get_recipe(name).family == "qwen3_vl" else args.images[:1]
        results += [measure(name, size, image, args) for image in images]
    rows = [
        [name, *(f"{r[name]:.2g}" if name.endswith("difference") else r[name] for r in results)]
        for name in list(results[0])
    ]
    print_table(["", *(str(number + 1) for number in range(len(results)))], rows)
    write_result({"machine": machine, "results": results}, args.output)


if __name__ == "__main__":
    main()
