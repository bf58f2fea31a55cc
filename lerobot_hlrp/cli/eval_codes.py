"""hlrp-eval-codes: how well a trained policy predicts codes, beside the constant prediction, on episodes of a dataset.

    hlrp-eval-codes --policy.path=outputs/stage2/checkpoints/last/pretrained_model --codes=codes.safetensors \\
        --dataset.repo_id=user/videos --dataset.root=data/videos --dataset.eval_split=0.1 --output=codes_eval.json

With `--dataset.eval_split` as in training, the figures are of the episodes that `lerobot-train` held out, and the
constant prediction is made from the others. Without it, all episodes named are measured, trained on or not. LeRobot's
own evaluation pass reports the loss alone, which says little about codes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot.configs.default import DatasetConfig

from hlrp_core.expectation import expect, expect_at_least, expect_file_path
from lerobot_hlrp.cli.command import run_command

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.processor import PolicyProcessorPipeline

    from hlrp_core.training import CodeEvaluation
    from lerobot_hlrp.policy import HLRPPolicy


@dataclass(kw_only=True)
class SavedPolicy:
    # Folder or Hub id of a trained policy, or folder of a core bundle.
    path: str
    # By default as in the checkpoint.
    device: str | None = None
    # Of token backends: `constrained`, `generate` or `free`. By default as in the checkpoint.
    decoding: str | None = None


@dataclass(kw_only=True)
class EvalCodesCommand:
    # What is measured.
    policy: SavedPolicy
    # `--dataset.eval_split` as in training measures the held-out episodes; `--dataset.episodes` names some.
    dataset: DatasetConfig
    # Labels: a code table of this very dataset, or ...
    codes: str | None = None
    # ... folder or Hub id of the LAQ.
    laq: str | None = None
    # By default as in the checkpoint.
    camera: str | None = None
    # Further cameras that the model sees, by default as in the checkpoint. `[]` for none.
    extra_cameras: list[str] | None = None
    # Δ in seconds, where the checkpoint has none because it learned from several.
    frame_gap_s: float | None = None
    # Normalise a state in the prompt by this dataset's own statistics instead of the saved ones: as a mix of datasets
    # does with each of them, of which the saved ones are the first one's.
    own_statistics: bool = False
    # Samples in a batch.
    batch_size: int = 16
    # Processes that load frames; 0 loads them in this one.
    num_workers: int = 0
    # Samples at most, spread over the episodes; 0 for all of them.
    max_samples: int = 0
    # JSON file for the figures.
    output: Path | None = None

    def __post_init__(self) -> None:
        expect_at_least("batch_size", 1, self.batch_size)
        expect_at_least("num_workers", 0, self.num_workers)
        expect_at_least("max_samples", 0, self.max_samples)


def evaluate(command: EvalCodesCommand) -> dict[str, Any]:
    """The figures, as they are printed and written."""
    import torch
    from tqdm import tqdm

    from hlrp_core.run_folder import write_json
    from hlrp_core.training import evaluate_codes
    from lerobot_hlrp.devices import choose_device
    from lerobot_hlrp.foundation_batches import FoundationBatches, count_training_codes, load_datasets, spread
    from lerobot_hlrp.policy_types import load_code_policy

    expect(
        command.codes is not None or command.laq is not None,
        "labels",
        "--codes=<code table of the dataset> or --laq=<folder or Hub id>",
        "none",
        "Name the labels that the policy learned from, on these episodes.",
    )
    if command.policy.device is not None:
        choose_device(command.policy.device)
    if command.output is not None:
        expect_file_path("output", command.output)
    policy, meta = load_code_policy(
        command.policy.path,
        command.dataset,
        device=command.policy.device,
        codes=command.codes,
        laq=command.laq,
        camera=command.camera,
        extra_cameras=command.extra_cameras,
        frame_gap_s=command.frame_gap_s,
        decoding=command.policy.decoding,
        own_features=command.own_statistics,
    )
    expect(
        policy.config.reads_state or not command.own_statistics,
        "own_statistics",
        "a policy with the state in its prompt (prompt.state_text)",
        "one that sees no state",
        "Leave --own_statistics out.",
    )
    config, device = policy.config, policy.backend.core.device
    others, held_out = load_datasets(command.dataset, config)
    measured = held_out if held_out is not None else others
    loading: dict[str, Any] = {
        "batch_size": command.batch_size,
        "num_workers": command.num_workers,
        "device": device,
        "preprocess": _choose_preprocessor(command, policy, meta),
    }
    counts = None
    if held_out is not None:
        counts = count_training_codes(
            others,
            policy.reader,
            codebook_size=policy.backend.codebook_size,
            code_seq_len=policy.backend.code_seq_len,
            **loading,
        )
    batches = FoundationBatches(measured, policy.reader, **loading)
    batches.items = spread(batches.items, command.max_samples)
    dtype = getattr(torch, config.dtype)
    evaluation = evaluate_codes(
        policy.backend,
        tqdm(batches, desc="codes", unit="batch"),
        training_counts=counts,
        precision=torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext(),
    )
    figures = {
        **evaluation.as_dict(),
        "policy": command.policy.path,
        "labels": command.codes or command.laq,
        "dataset": command.dataset.repo_id,
        "is_held_out": held_out is not None,
        "episodes": [int(e) for e in measured.episodes] if measured.episodes is not None else None,
    }
    if config.code_head == "tokens":  # the other heads decode nothing
        figures["decoding"] = config.decoding
    _report(evaluation, figures, command.dataset)
    if command.output is not None:
        command.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(command.output, figures)
        print(f"Figures: {command.output}")
    return figures


def _choose_preprocessor(
    command: EvalCodesCommand, policy: HLRPPolicy, meta: LeRobotDatasetMetadata
) -> PolicyProcessorPipeline[dict[str, Any], dict[str, Any]] | None:
    """What normalises the states, where the model sees them."""
    from lerobot_hlrp.mixing import make_preprocessor
    from lerobot_hlrp.policy_types import load_preprocessor

    if command.own_statistics or not policy.config.reads_state:
        return make_preprocessor(policy.config, meta, meta)
    return load_preprocessor(command.policy.path, policy, meta)


def _report(evaluation: CodeEvaluation, figures: dict[str, Any], dataset: DatasetConfig) -> None:
    count = len(figures["episodes"]) if figures["episodes"] is not None else "all"
    if figures["is_held_out"]:
        print(f"{count} episodes of {dataset.repo_id} that lerobot-train holds out at eval_split={dataset.eval_split}:")
    else:
        print(
            f"{count} episodes of {dataset.repo_id}, trained on or not. "
            "--dataset.eval_split=<as in training> measures the held-out ones alone."
        )
    print(evaluation.as_table())


def main() -> None:
    run_command(EvalCodesCommand, evaluate)


if __name__ == "__main__":
    main()
