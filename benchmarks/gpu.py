"""Codes, action chunks and training in bfloat16 on a GPU, beside what its memory and its arithmetic allow.

    python benchmarks/gpu.py --output outputs/gpu.json
    python benchmarks/gpu.py --backbone=FOLDER --shape=2b --compile    # a folder of any Qwen3-VL, without weights
    python benchmarks/gpu.py --backbone=TINY --device=cpu --probe_mb=64 --probe_side=512    # tries the script

The backbone is random: of `--backbone` only config.json and the processor are read, and `--shape=2b` puts the sizes of
Qwen3-VL-2B in the place of its own. What is compared takes turns after a warm-up, and the device is synchronised after
every turn; times are medians in milliseconds. First the device's rates are measured on large tensors: of its memory by
copying (bytes read and written), of its arithmetic by a product of bfloat16 matrices.

- `codes`: `constrained` decodes an encoded prompt, `whole` is `latent_from_batch`, with image processing and words.
  `floor` is that of benchmarks/decoding.py: vision, prefill, then S - 1 steps of one token.
- `chunk`: `whole` is `predict_action_chunk` of a `prefix_flow` head of the default size, 50 actions in 10 flow steps;
  `floor` the backbone on an encoded prompt, the expert's memory, and the expert alone once a flow step.
- `hardware` is what the linear layers of `floor` must take: for each forward (of the backbone, or one flow step) the
  larger of its weights' bytes / memory rate and 2 * weights * rows / arithmetic rate, summed over the forwards.
  Attention, caches and activations come on top. Weights are bfloat16 in both.
- `training`: a stage-2 step of all weights, in float32 under bfloat16's autocast, with clipping and AdamW. `full` takes
  the loss of benchmarks/training_loss.py on full logits. `hardware` is 6 * weights * rows of all linear layers, and of
  the vocabulary projection at the labels, / arithmetic rate, and then AdamW's 28 bytes a weight (weight, gradient, two
  moments read, all but the gradient written) / memory rate. `peak` is the most memory of a step, of which weights,
  gradients and moments need `state`. What does not fit into memory is null.

`--compile` adds `compiled`, by torch.compile: in decoding the steps over the cache (and `compiled_equal_share` of the
codes), in a chunk the decoder layers and the flow expert (as a CUDA graph), in training the decoder layers.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoding import CODES, INSTRUCTIONS, run_floor
from measuring import describe_machine, extra_peak_bytes, interleaved_ms, print_table, write_result
from torch import Tensor, nn
from training_loss import full_logits_loss, our_loss
from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration

from hlrp_core import ActionBatch, BackendMode, LatentOutput, SamplingOptions
from hlrp_core.backbones.qwen3_vl import Qwen3VLCore
from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.expectation import expect
from hlrp_core.heads import ActionContext, ActionHeadConfig, PrefixEncoding, PrefixFlowHead
from hlrp_core.registry import get_recipe
from hlrp_core.training.config import CodeTrainingConfig

Call = Callable[[], object]
HEAD = ActionHeadConfig(kind="prefix_flow", chunk_size=50, num_flow_steps=10, action_dim=7, state_dim=14)
COMPILER = "inductor"
PROBE_REPEATS = 10  # between two synchronisations, whose own time would count
TEXT_2B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128}
TEXT_2B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936, "initializer_range": 0.02}
VISION_2B = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "out_hidden_size": 2048}
VISION_2B |= {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304, "patch_size": 16}
MROPE_2B = [24, 20, 20]


def build_model(backbone: str, shape: str, *, device: str, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    config = AutoConfig.from_pretrained(backbone)
    if shape == "2b":
        for name, value in TEXT_2B.items():
            setattr(config.text_config, name, value)
        for name, value in VISION_2B.items():
            setattr(config.vision_config, name, value)
        config.text_config.rope_parameters["mrope_section"] = MROPE_2B
    with torch.device(device):  # initialised there, too
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)


def free_memory() -> None:
    """Of backends before: what compiles them refers to them in circles."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(args: argparse.Namespace, dtype: torch.dtype, **settings: Any) -> ComposedBackend:
    free_memory()
    torch.manual_seed(0)
    model = build_model(args.backbone, args.shape, device=args.device, dtype=dtype)
    processor = AutoProcessor.from_pretrained(args.backbone)
    patches = processor.image_processor.patch_size, model.config.vision_config.patch_size
    expect(
        patches[0] == patches[1],
        "backbone",
        f"a processor with patches of {patches[1]} pixels, as the shape has",
        f"one with {patches[0]} in {args.backbone}",
        "Give --shape=2b the config.json and the processor of a published Qwen3-VL.",
    )
    core = Qwen3VLCore(model, processor)
    backend = get_recipe("qwen_chat").compose(BackendConfig(name="qwen_chat", **settings), core, True)
    if backend.action_head is not None:
        backend.action_head.to(dtype)
    backend.setup(device=torch.device(args.device))
    return backend.eval()


def make_batch(args: argparse.Namespace, size: int, **labels: Any) -> ActionBatch:
    frames = torch.randint(0, 256, (size, 1, args.image_size, args.image_size, 3), dtype=torch.uint8)
    return ActionBatch(frames, [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(size)], **labels)


# -- times, rates, floors ---------------------------------------------------------------------------------------------


def measure_ms(calls: Mapping[str, Call], args: argparse.Namespace) -> dict[str, float]:
    def run(name: str) -> None:
        # what is compiled in the modules that calls share counts in its own row alone
        with torch.compiler.set_stance("default" if name == "compiled" else "force_eager"):
            calls[name]()
        if args.device != "cpu":
            torch.cuda.synchronize(args.device)

    return interleaved_ms({name: partial(run, name) for name in calls}, args.rounds, warmup=3)


def measure_rates(args: argparse.Namespace) -> dict[str, float]:
    source = torch.zeros(args.probe_mb * 2**20, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    square = torch.randn(args.probe_side, args.probe_side, device=args.device).bfloat16()
    calls = {
        "copy": lambda: [target.copy_(source) for _ in range(PROBE_REPEATS)],
        "product": lambda: [square @ square for _ in range(PROBE_REPEATS)],
    }
    per_s = {name: 1e3 * PROBE_REPEATS / max(ms, 0.01) for name, ms in measure_ms(calls, args).items()}
    return {
        "bytes_per_s": 2 * source.numel() * per_s["copy"],
        "operations_per_s": 2 * args.probe_side**3 * per_s["product"],
    }


def count_work(function: Call, backend: ComposedBackend) -> list[list[int]]:
    """Bytes of weights and operations of the linear layers, in each forward of the backbone or of the expert."""
    forwards: list[list[int]] = []

    def count(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        forwards[-1][0] += layer.weight.numel() * layer.weight.element_size()
        forwards[-1][1] += 2 * inputs[0].numel() * layer.out_features

    starts: list[nn.Module] = [backend.core]
    if isinstance(backend.action_head, PrefixFlowHead):
        starts.append(backend.action_head.expert)
    hooks = [start.register_forward_pre_hook(lambda *_: forwards.append([0, 0])) for start in starts]
    hooks += [layer.register_forward_hook(count) for layer in backend.modules() if isinstance(layer, nn.Linear)]
    with torch.compiler.set_stance("force_eager"):
        function()
    for hook in hooks:
        hook.remove()
    return forwards


def compare(times: dict[str, float], hardware_ms: float) -> dict[str, Any]:
    """The times, and how far each is above the floors."""
    result: dict[str, Any] = {f"{name}_ms": ms for name, ms in times.items()}
    result["hardware_ms"] = round(hardware_ms, 4)
    if "floor" in times:
        result |= {f"{name}_over_floor": round(ms / times["floor"], 2) for name, ms in times.items() if name != "floor"}
    return result | {f"{name}_over_hardware": round(ms / hardware_ms, 2) for name, ms in times.items()}


@torch.no_grad()
def measure_prediction(
    args: argparse.Namespace, rates: dict[str, float], backend: ComposedBackend, calls: dict[str, Call]
) -> dict[str, Any]:
    work = count_work(calls["floor"], backend)
    seconds = sum(max(size / rates["bytes_per_s"], count / rates["operations_per_s"]) for size, count in work)
    return {"forwards": len(work), **compare(measure_ms(calls, args), 1e3 * seconds)}


# -- what is measured -------------------------------------------------------------------------------------------------


def measure_codes(
    args: argparse.Namespace, rates: dict[str, float], code_seq_len: int, codebook_size: int
) -> list[dict[str, Any]]:
    backend = build(args, torch.bfloat16, code_seq_len=code_seq_len, codebook_size=codebook_size)
    if args.compile:
        compile_steps(backend)
    return [_measure_decoding(args, rates, backend, batch_size) for batch_size in args.batch_sizes]


def _measure_decoding(
    args: argparse.Namespace, rates: dict[str, float], backend: ComposedBackend, batch_size: int
) -> dict[str, Any]:
    batch = make_batch(args, batch_size)
    inputs = backend._prompt(batch, for_prediction=True)
    calls: dict[str, Callable[[], Any]] = {
        "constrained": lambda: backend.code_head.predict(backend.core, inputs, SamplingOptions()),
        "whole": lambda: backend.latent_from_batch(batch, mode=BackendMode.CODES),
        "floor": lambda: run_floor(backend, inputs),
    }
    case: dict[str, Any] = {"batch": batch_size, "S": backend.code_seq_len, "K": backend.codebook_size}
    case |= {"prompt_tokens": inputs.tokens.ids.shape[1]}
    if args.compile:
        calls["compiled"] = calls["constrained"]
        case["compiled_equal_share"] = compare_codes(calls["constrained"])
    return {**case, **measure_prediction(args, rates, backend, calls)}


def compare_codes(predict: Callable[[], LatentOutput]) -> float:
    """The share of codes that are the same when compiled. Rounding may tip a few, as random weights are undecided."""
    tokens = predict().tokens
    with torch.compiler.set_stance("force_eager"):
        return round(float((tokens == predict().tokens).float().mean()), 3)


def compile_steps(backend: ComposedBackend) -> None:
    """The steps over the cache alone: the prefill adds images to the text at masked positions, where graphs break.

    One graph serves all lengths. It is no CUDA graph, as the cache grows into new tensors.
    """
    model: Any = backend.core.model.model.language_model
    plain, compiled = model.forward, torch.compile(model.forward, backend=COMPILER)
    model.forward = lambda **inputs: (plain if inputs.get("input_ids") is None else compiled)(**inputs)


def compile_layers(backend: ComposedBackend) -> None:
    """Without a cache: with one, every layer would be compiled by itself."""
    model: Any = backend.core.model.model
    for layer in model.language_model.layers:
        layer.compile(backend=COMPILER)


def measure_chunk(args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    backend = build(args, torch.bfloat16, action_head=HEAD)
    head = backend.action_head
    assert isinstance(head, PrefixFlowHead)
    batch = make_batch(args, 1, state=torch.randn(1, HEAD.state_dim))
    inputs = backend._prompt(batch, for_prediction=True)
    state = torch.randn(1, HEAD.state_dim, device=args.device)
    noise = torch.randn(1, HEAD.chunk_size, HEAD.action_dim, device=args.device)

    def floor() -> None:
        hidden, _ = backend.core(inputs.tokens, inputs.images)
        memory = head.encode_memory(ActionContext(state=state, prefix=PrefixEncoding(hidden, inputs.tokens.valid_mask)))
        modulation = head.expert.modulation(torch.ones(1, device=args.device))
        for _ in range(HEAD.num_flow_steps):
            head.expert(noise, modulation, memory)

    calls: dict[str, Call] = {"whole": lambda: backend.predict_action_chunk(batch), "floor": floor}
    if args.compile:
        compile_layers(backend)
        head.expert.compile(backend=COMPILER, **({} if args.device == "cpu" else {"mode": "reduce-overhead"}))
        calls["compiled"] = calls["whole"]
    case = {"batch": 1, "chunk": HEAD.chunk_size, "flow_steps": HEAD.num_flow_steps}
    case |= {"expert_weights": sum(p.numel() for p in head.parameters()), "prompt_tokens": inputs.tokens.ids.shape[1]}
    return {**case, **measure_prediction(args, rates, backend, calls)}


class Step:
    """A training step by the given loss."""

    def __init__(self, backend: ComposedBackend, batch: ActionBatch, optimizer: torch.optim.Optimizer, loss: Callable):
        self.backend, self.batch, self.optimizer, self.loss = backend, batch, optimizer, loss

    def forward(self) -> Tensor:
        with torch.autocast(self.backend.core.device.type, dtype=torch.bfloat16):
            return self.loss(self.backend, self.batch)

    def __call__(self) -> None:
        self.forward().backward()
        nn.utils.clip_grad_norm_(self.backend.parameters(), CodeTrainingConfig.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int | None:
        """The most memory, weights and moments included; None where there is not enough."""
        device = self.backend.core.device
        try:
            self()  # makes the moments
            if device.type == "cpu":
                held = [x for state in self.optimizer.state.values() for x in state.values()]
                held += self.backend.parameters()
                return sum(x.numel() * x.element_size() for x in held) + extra_peak_bytes(self)
            torch.cuda.reset_peak_memory_stats(device)
            self()
            return torch.cuda.max_memory_allocated(device)
        except torch.OutOfMemoryError:
            return None
        finally:
            self.optimizer.zero_grad()  # what a step that failed has left


def measure_training(args: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    backend = build(args, torch.float32).train()
    B, S, K = args.training_batch_size, backend.code_seq_len, backend.codebook_size
    codes = torch.randint(0, K, (B, S))
    batch = make_batch(args, B, target_codes=codes)
    # fused: torch's other kernel makes copies of all weights on a GPU, which would hide what a loss takes
    fused = args.device != "cpu"
    betas = CodeTrainingConfig.betas
    optimizer = torch.optim.AdamW(backend.parameters(), lr=CodeTrainingConfig.lr, betas=betas, fused=fused)
    losses = {"ours": our_loss, "full": full_logits_loss}
    steps = {name: Step(backend, batch, optimizer, loss) for name, loss in losses.items()}
    operations = sum(count for _, count in count_work(steps["ours"].forward, backend))
    operations += 2 * backend.code_head.completion(codes).numel() * backend.core.lm_head.weight.numel()  # type: ignore[union-attr]
    num_weights = sum(p.numel() for p in backend.parameters())
    arithmetic_ms = 3e3 * operations / rates["operations_per_s"]  # backward: twice forward
    update_ms = 28e3 * num_weights / rates["bytes_per_s"]
    peaks = {name: step.peak_bytes() for name, step in steps.items()}
    if args.compile:
        compile_layers(backend)
        steps["compiled"] = steps["ours"]
        peaks["compiled"] = steps["compiled"].peak_bytes()
    times = measure_ms({name: step for name, step in steps.items() if peaks[name] is not None}, args)
    result: dict[str, Any] = {"batch": B, "weights": num_weights, "vocabulary": len(backend.core.lm_head.weight)}
    result |= {"arithmetic_ms": round(arithmetic_ms, 4), "update_ms": round(update_ms, 4)}
    result |= dict.fromkeys(f"{name}_ms" for name in steps)
    result |= compare(times, arithmetic_ms + update_ms)
    for name, peak in peaks.items():
        result[f"{name}_samples_per_s"] = None if peak is None else round(1e3 * B / times[name], 2)
        result[f"{name}_peak_mb"] = None if peak is None else round(peak / 2**20, 1)
    return {**result, "state_mb": round(16 * num_weights / 2**20, 1)}


def describe_device(device: str) -> dict[str, Any]:
    machine = describe_machine()
    if device == "cpu":
        return machine
    gpu = torch.cuda.get_device_properties(device)
    about = {"gpu": gpu.name, "gpu_memory_mb": gpu.total_memory // 2**20, "cuda": torch.version.cuda, "driver": None}
    if (command := shutil.which("nvidia-smi")) is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = next(iter(subprocess.run(query, capture_output=True, text=True).stdout.split()), None)
    return {**machine, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="Qwen/Qwen3-VL-2B-Instruct", help="folder or Hub id of a Qwen3-VL")
    parser.add_argument("--shape", default="own", choices=["own", "2b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8], help="of decoding")
    parser.add_argument("--training_batch_size", type=int, default=8)
    parser.add_argument("--probe_mb", type=int, default=4096, help="copied to measure the memory's rate")
    parser.add_argument("--probe_side", type=int, default=8192, help="of the matrices to measure arithmetic with")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("--device: expected a GPU, got none. Next step: --device=cpu with a tiny backbone.")
    machine, rates = describe_device(args.device), measure_rates(args)
    speeds = f"{rates['bytes_per_s'] / 1e9:,.0f} GB/s, {rates['operations_per_s'] / 1e12:,.1f} TFLOP/s in bfloat16"
    print(f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}: {speeds}")
    settings = {name: getattr(args, name) for name in ("shape", "compile", "image_size", "rounds")}
    result: dict[str, Any] = {
        "machine": machine,
        **settings,
        "rates": rates,
    }  # written after each part: minutes of work
    codes = [row for sizes in CODES for row in measure_codes(args, rates, *sizes)]
    write_result(result := {**result, "codes": codes}, args.output)
    header = ["codes", *(f"S={row['S']}, K={row['K']}, batch {row['batch']}" for row in codes)]
    print_table(header, [[key, *(row[key] for row in codes)] for key in codes[0] if key not in ("S", "K", "batch")])
    chunk = measure_chunk(args, rates)
    write_result(result := {**result, "chunk": chunk}, args.output)
    print_table(["chunk", ""], [list(item) for item in chunk.items()])
    training = measure_training(args, rates)
    write_result({**result, "training": training}, args.output)
    print_table(["training", ""], [list(item) for item in training.items()])


if __name__ == "__main__":
    main()
