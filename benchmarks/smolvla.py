"""A chunk and a training step of `prefix_flow`, beside those of LeRobot's own `smolvla` policy.

    python benchmarks/smolvla.py --output benchmarks/results/smolvla.json

Both policies stand on one backbone configuration (`hlrp-backbone --family=smolvlm --size=small`: heads of 64 wide as in
SmolVLM2, all of its layers used by both) with random weights in float32, see one camera image of the same size, and
predict chunks of 50 actions in 10 flow steps; state and actions are 32 wide, to which `smolvla` pads. Both train
the expert alone, on a frozen backbone, which is the default of `smolvla`. The rows of `prefix_flow`:

- `matched`: an expert as wide and as deep as that of `smolvla`, with as many parameters within 10%. It reads the flow
  time as DiT and pi0.5 do, from an embedding as wide as itself: such parameters are multiplied with once a chunk;
- `same_heads`: also as wide, as deep and as large, but with the heads of `smolvla` and our default time embedding, so
  that four fifths of the parameters take part in every flow step;
- `defaults`: the expert that `lerobot-train --policy.type=hlrp_smolvlm --policy.action_head=prefix_flow` makes.

Ours multiply by oneDNN where no gradient is wanted (`hlrp_core/backbones/cpu_linear.py`), `smolvla` by torch's default,
MKL. Part of the ratio is due to that on an AMD processor, where MKL leaves AVX-512 unused; `--mkl` turns it off.

A chunk is a whole `predict_action_chunk`, a training step forward, backward and AdamW. `smolvla` gets its instruction
tokenised; ours remember it from the warm-up. Rounds take turns; times are medians in milliseconds.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config
from lerobot.policies.pretrained import PreTrainedPolicy
from measuring import describe_machine, interleaved_ms, print_table, write_result
from torch import nn
from transformers import AutoConfig

import lerobot_policy_hlrp  # noqa: F401 - registers the policy types
from hlrp_core.backbones.cpu_linear import torch_kernels
from hlrp_core.backbones.random_checkpoint import write_random_checkpoint

PADDED_DIM, CHUNK, FLOW_STEPS = 32, 50, 10
INSTRUCTION = "push the green block to the blue corner, slowly"


def build_peer(backbone: Path, num_layers: int, image_size: int) -> PreTrainedPolicy:
    settings = {"vlm_model_name": str(backbone), "num_vlm_layers": num_layers, "num_steps": FLOW_STEPS}
    side = (image_size, image_size)
    config = make_policy_config("smolvla", device="cpu", chunk_size=CHUNK, resize_imgs_with_padding=side, **settings)
    return _build("smolvla", config, image_size)


def build_ours(backbone: Path, image_size: int, **expert: int) -> PreTrainedPolicy:
    settings = {"mode": "actions", "action_head": "prefix_flow", "freeze_backbone": True, "backbone": str(backbone)}
    config = make_policy_config("hlrp_smolvlm", device="cpu", chunk_size=CHUNK, **settings)
    for name, value in {**expert, "num_flow_steps": FLOW_STEPS}.items():
        setattr(config.action_expert, name, value)
    return _build("hlrp_smolvlm", config, image_size)


def _build(name: str, config: Any, image_size: int) -> PreTrainedPolicy:
    config.input_features = {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size)),
        "observation.state": PolicyFeature(FeatureType.STATE, (PADDED_DIM,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (PADDED_DIM,))}
    torch.manual_seed(0)
    return get_policy_class(name)(config)


def size_expert(peer: Any, backbone: Path, image_size: int, **shape: int) -> dict[str, int]:
    """An expert of the peer's width and depth; its MLP takes what `shape` leaves of the peer's parameters."""
    theirs = peer.model.vlm_with_expert.lm_expert.config
    shape = {"hidden_dim": theirs.hidden_size, "num_layers": theirs.num_hidden_layers, "mlp_dim": 64, **shape}
    head = build_ours(backbone, image_size, **shape).backend.action_head
    per_unit = 3 * theirs.hidden_size * theirs.num_hidden_layers  # gate, up and down, in every layer
    missing = describe(peer)["expert_parameters"] - count(head)
    return {**shape, "mlp_dim": 64 + max(0, missing // per_unit // 64 * 64)}


def build_policies(backbone: Path, num_vlm_layers: int, image_size: int) -> dict[str, Any]:
    peer = build_peer(backbone, num_vlm_layers, image_size)
    theirs = peer.model.vlm_with_expert.lm_expert.config
    theirs_share = theirs.num_attention_heads // theirs.num_key_value_heads
    num_heads = theirs.hidden_size // theirs.head_dim
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads // theirs_share, "head_dim": theirs.head_dim}
    matched = size_expert(peer, backbone, image_size, **heads, time_dim=theirs.hidden_size)
    heads = {"num_heads": theirs.num_attention_heads, "num_kv_heads": theirs.num_key_value_heads}
    same_heads = size_expert(peer, backbone, image_size, **heads, head_dim=theirs.head_dim)
    return {
        "smolvla": peer,
        "matched": build_ours(backbone, image_size, **matched),
        "same_heads": build_ours(backbone, image_size, **same_heads),
        "defaults": build_ours(backbone, image_size),
    }


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def describe(policy: Any) -> dict[str, int]:
    """What differs between the policies: parameters, those among them that every flow step multiplies with, layers."""
    if policy.name == "smolvla":
        model, joint = policy.model, policy.model.vlm_with_expert
        in_each_step = [joint.lm_expert, model.action_in_proj, model.action_out_proj]
        in_each_step += [model.action_time_mlp_in, model.action_time_mlp_out]
        backbone, expert = count(joint.vlm), count(*in_each_step, model.state_proj)
        vlm_layers, expert_layers, width = joint.num_vlm_layers, joint.num_expert_layers, joint.expert_hidden_size
    else:
        core, head = policy.backend.core, policy.backend.action_head
        in_each_step = [head.expert.layers, head.expert.action_in, head.expert.action_out]
        backbone, expert = count(core), count(head)
        vlm_layers = core.model.config.text_config.num_hidden_layers
        expert_layers, width = head.config.num_layers, head.config.hidden_dim
    return {
        "backbone_parameters": backbone,
        "vlm_layers": vlm_layers,
        "expert_parameters": expert,
        "parameters_in_each_flow_step": count(*in_each_step),
        "expert_layers": expert_layers,
        "expert_width": width,
    }


def build_batch(size: int, image_size: int, peer: Any) -> dict[str, Any]:
    """One preprocessed batch that both policies read."""
    tokens = peer.model.vlm_with_expert.processor.tokenizer([INSTRUCTION + "\n"] * size, return_tensors="pt")
    return {
        "observation.images.top": torch.rand(size, 3, image_size, image_size),
        "observation.state": torch.randn(size, PADDED_DIM),
        "observation.language.tokens": tokens["input_ids"],
        "observation.language.attention_mask": tokens["attention_mask"].bool(),
        "action": torch.randn(size, CHUNK, PADDED_DIM),
        "action_is_pad": torch.zeros(size, CHUNK, dtype=torch.bool),
        "task": [INSTRUCTION] * size,
        "index": torch.arange(size),
        "episode_index": torch.arange(size),
    }


def training_step(policy: PreTrainedPolicy, batch: dict[str, Any]) -> Callable[[], None]:
    policy.train()
    optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=1e-4)

    def step() -> None:
        loss, _ = policy(dict(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(backbone: Path, batch_size: int, rounds: int) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(backbone)
    image_size: int = config.vision_config.image_size
    policies = build_policies(backbone, config.text_config.num_hidden_layers, image_size)
    facts = {name: describe(policy) for name, policy in policies.items()}
    for name in ("matched", "same_heads"):
        ratio = facts[name]["expert_parameters"] / facts["smolvla"]["expert_parameters"]
        assert 0.9 <= ratio <= 1.1, f"{name}: expected as many parameters as in smolvla's expert, got {ratio:.2f} times"
    peer = policies["smolvla"]
    batch = build_batch(1, image_size, peer)
    chunks = {name: partial(policy.predict_action_chunk, batch) for name, policy in policies.items()}
    chunk_ms = interleaved_ms(chunks, rounds)
    batch = build_batch(batch_size, image_size, peer)
    steps = {name: training_step(policy, batch) for name, policy in policies.items()}
    step_ms = interleaved_ms(steps, max(3, rounds // 3))
    rows = {
        name: {
            **facts[name],
            "chunk_ms": chunk_ms[name],
            "chunk_ratio": round(chunk_ms[name] / chunk_ms["smolvla"], 2),
            "training_step_ms": step_ms[name],
            "training_step_ratio": round(step_ms[name] / step_ms["smolvla"], 2),
        }
        for name in policies
    }
    return {"image_size": image_size, "batch_size": batch_size, "rounds": rounds, "policies": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=["tiny", "small"])
    parser.add_argument("--batch_size", type=int, default=8, help="of the training step; a chunk is for one robot")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mkl", action="store_true", help="torch's default kernels on both sides")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    machine = describe_machine()
    kernels = torch_kernels() if args.mkl else nullcontext()
    with tempfile.TemporaryDirectory() as name, kernels:
        backbone = write_random_checkpoint(Path(name) / "backbone", family="smolvlm", size=args.size)
        result = {
            "machine": machine,
            "size": args.size,
            "mkl": args.mkl,
            **measure(backbone, args.batch_size, args.rounds),
        }
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    rows = result["policies"]
    print_table(["", *rows], [[key, *(row[key] for row in rows.values())] for key in rows["smolvla"]])
    write_result(result, args.output)


if __name__ == "__main__":
    main()
