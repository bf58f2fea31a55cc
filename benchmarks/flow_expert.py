"""Latency of a `prefix_flow` chunk: the prefix encoded once per chunk, against once per flow step.

    python benchmarks/flow_expert.py --output outputs/flow_expert.json

Both sides are the same head with the same weights and give the same actions (checked). The rounds alternate between
the two, so that a busy machine slows both. Times are medians in milliseconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import describe_machine, interleaved_ms, print_table, write_result
from torch import Tensor

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads import ActionContext, ActionHeadConfig, FlowHead, PrefixEncoding, PrefixFlowHead, build_action_head
from hlrp_core.heads.flow_matching import integrate, solver_times

# name: (settings of the head, prefix width, prefix length, batch size)
SIZES: dict[str, tuple[dict[str, int], int, int, int]] = {
    "tiny_batch_1": ({"hidden_dim": 128, "num_layers": 3}, 128, 40, 1),
    "tiny_batch_32": ({"hidden_dim": 128, "num_layers": 3}, 128, 40, 32),
    "long_prefix": ({"hidden_dim": 256, "num_layers": 4, "chunk_size": 16}, 960, 256, 1),
    "long_chunk": ({"hidden_dim": 384, "num_layers": 8, "num_heads": 6, "chunk_size": 50}, 960, 128, 1),
}


def build_problem(name: str) -> tuple[FlowHead, ActionContext, Tensor]:
    settings, prefix_dim, length, batch_size = SIZES[name]
    torch.manual_seed(0)
    config = ActionHeadConfig(kind="prefix_flow", state_dim=6, action_dim=6, **settings)
    head = build_action_head(config, prefix_dim=prefix_dim, codebook_size=8, code_seq_len=4).eval()
    assert isinstance(head, PrefixFlowHead)
    with torch.no_grad():  # fresh weights do not depend on the flow time yet
        for parameter in head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    prefix = PrefixEncoding(
        torch.randn(batch_size, length, prefix_dim), torch.ones(batch_size, length, dtype=torch.bool)
    )
    noise = torch.randn(batch_size, config.chunk_size, config.action_dim)
    return head, ActionContext(state=torch.randn(batch_size, 6), prefix=prefix), noise


def predict_naively(head: FlowHead, context: ActionContext, noise: Tensor) -> Tensor:
    """Every flow step projects the prefix into keys and values again."""
    num_steps = head.config.num_flow_steps
    times = torch.tensor(solver_times(num_steps)).unsqueeze(-1).expand(-1, len(noise))
    return integrate(lambda x_t, step: head.velocity(context, x_t, times[step]), noise, num_steps)


def measure(name: str, rounds: int) -> dict[str, Any]:
    head, context, noise = build_problem(name)
    options = SamplingOptions(noise=noise)
    with torch.no_grad():
        difference = (head.predict(context, options) - predict_naively(head, context, noise)).abs().max().item()
        assert difference < 1e-4, f"the two paths differ by {difference}"
        times = interleaved_ms(
            {
                "cached": lambda: head.predict(context, options),
                "naive": lambda: predict_naively(head, context, noise),
            },
            rounds,
        )
    head.train()
    training = interleaved_ms({"step": lambda: head.per_sample_loss(context, noise, None).mean().backward()}, rounds)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "batch_size": len(noise),
        "chunk_size": head.config.chunk_size,
        "prefix_tokens": SIZES[name][2],
        "cached_ms": times["cached"],
        "naive_ms": times["naive"],
        "speedup": round(times["naive"] / times["cached"], 2),
        "max_difference": difference,
        "training_step_ms": training["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    results = [measure(name, args.rounds) for name in SIZES]
    print_table(list(results[0]), [list(row.values()) for row in results])
    write_result({"machine": machine, "results": results}, args.output)


if __name__ == "__main__":
    main()
