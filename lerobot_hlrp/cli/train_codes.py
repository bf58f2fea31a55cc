"""hlrp-train-codes: stage 2 outside `lerobot-train`, measured by real decoding on held-out episodes while it runs.

    hlrp-train-codes --backend=qwen_chat --backbone=Qwen/Qwen3-VL-2B-Instruct --codes=codes.safetensors \\
        --dataset.repo_id=user/videos --dataset.root=data/videos --dataset.eval_split=0.1 \\
        --output_dir=outputs/stage2 --steps=10000 --batch_size=32

The result, `<output_dir>/checkpoints/last/pretrained_model`, is a policy folder: `lerobot-train --policy.path=...`
goes on from it, `hlrp-eval-codes --policy.path=...` measures it, and `hlrp_core.bundle.load_backend` loads it without
LeRobot. The same command again continues a run that was interrupted. `accelerate launch $(which hlrp-train-codes) ...`
uses several devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lerobot.configs.default import DatasetConfig

from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.training.config import CodeTrainingConfig
from lerobot_hlrp.cli.command import run_command

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset

    from lerobot_hlrp.policy import HLRPPolicy


@dataclass(kw_only=True)
class TrainCodesCommand(CodeTrainingConfig):
    # The data. `--dataset.eval_split` holds episodes out as `lerobot-train` does: the last ones of each task.
    dataset: DatasetConfig
    # Folder of the run; the same command again continues it.
    output_dir: Path
    # How the core composes it: `hlrp_core.available_backends()`.
    backend: str = "qwen_chat"
    # Hub id or folder of the pretrained vision-language model.
    backbone: str
    # Labels: a code table of this very dataset, or ...
    codes: str | None = None
    # ... folder or Hub id of a LAQ that labels frame pairs while training.
    laq: str | None = None
    # Camera whose frames the LAQ saw, such as `top`. By default the only one.
    camera: str | None = None
    # Further cameras that the model sees at time t.
    extra_cameras: list[str] = field(default_factory=list)
    # Dataset frames between the two frames of a pair. By default as in the table or the LAQ.
    frame_gap: int | None = None
    # What stands around image and instruction.
    prompt: PromptConfig = field(default_factory=PromptConfig)
    # How codes are written.
    token_scheme: TokenSchemeConfig = field(default_factory=TokenSchemeConfig)
    # Pixels along an image's side, as the backbone sees it. By default as the backbone's processor has it.
    image_size: int | None = None
    # An image as several tiles of `image_size` (SmolVLM backends): sharper, and many times the tokens.
    image_splitting: bool = False
    # What the loss is a mean of (token backends): the whole `completion`, `codes_only`, or `restricted` to the K code
    # rows of the vocabulary at the code positions.
    code_objective: str = "completion"
    # How hidden states become codes (latent-head backends): from their `mean`, the `last` one, or by a learned `query`.
    latent_pooling: str = "mean"
    # What is trained of the vocabulary's tables (token backends): `all` of them, or the `code_rows` alone.
    train_vocabulary: str = "all"
    # Keep the vision tower as it is.
    freeze_vision: bool = False
    # Of the backbone's weights. Below float32 only where memory demands it.
    backbone_dtype: str = "float32"
    # Samples in a batch, on each device.
    batch_size: int = 8
    # Processes that load frames.
    num_workers: int = 4
    # Held-out samples at most in an evaluation, spread over the held-out episodes; 0 for all of them.
    max_eval_samples: int = 1024
    # By default the best there is; `cpu` is the other choice.
    device: str | None = None


def train(command: TrainCodesCommand) -> int:
    """Exit status: 0, or 130 when interrupted."""
    from lerobot.policies.factory import make_pre_post_processors

    from hlrp_core.training import train_codes
    from hlrp_core.training.code_training import make_accelerator
    from lerobot_hlrp.foundation_batches import FoundationBatches, load_datasets, spread
    from lerobot_hlrp.policy_types import make_code_policy

    accelerator = make_accelerator(command, cpu=command.device == "cpu")
    policy, meta = make_code_policy(
        command.dataset,
        command.backend,
        device=str(accelerator.device),
        **{name: getattr(command, name) for name in _POLICY_SETTINGS},
    )
    training_data, held_out = load_datasets(command.dataset, policy.config)
    processors = make_pre_post_processors(policy.config, dataset_stats=meta.stats)
    loading: dict[str, Any] = {"num_workers": command.num_workers, "device": accelerator.device}
    loading["preprocess"] = processors[0] if policy.config.reads_state else None
    batches = FoundationBatches(
        training_data,
        policy.reader,
        batch_size=command.batch_size,
        shuffle_seed=command.seed,
        shard=(accelerator.process_index, accelerator.num_processes),
        **loading,
    )
    eval_batches = None
    if held_out is not None:
        eval_batches = FoundationBatches(held_out, policy.reader, batch_size=command.batch_size, **loading)
        eval_batches.items = spread(eval_batches.items, command.max_eval_samples)
    if accelerator.is_main_process:
        print(_describe(policy, batches, training_data, eval_batches))

    def save_model(folder: Path) -> None:
        policy.save_pretrained(folder)
        for processor in processors:
            processor.save_pretrained(folder)

    result = train_codes(
        policy.backend,
        batches,
        command,
        output_dir=command.output_dir,
        eval_batches=eval_batches,
        settings=_settings(command, policy),
        save_model=save_model,
        accelerator=accelerator,
    )
    if accelerator.is_main_process and result.is_finished:
        if result.evaluation is not None:
            print(result.evaluation.as_table())
        print(f"The model: {result.folder}")
    return 0 if result.is_finished else 130


_POLICY_SETTINGS = (
    *("backbone", "codes", "laq", "camera", "extra_cameras", "frame_gap", "prompt", "token_scheme", "image_size"),
    *("image_splitting", "code_objective", "latent_pooling", "train_vocabulary", "freeze_vision"),
    *("backbone_dtype", "dtype"),
)


def _settings(command: TrainCodesCommand, policy: HLRPPolicy) -> dict[str, Any]:
    """What a continued run must have in common with its beginning, beside the core's settings."""
    return {
        "dataset": command.dataset.repo_id,
        "episodes": command.dataset.episodes,
        "eval_split": command.dataset.eval_split,
        "batch_size": command.batch_size,
        "backbone": command.backbone,
        "cameras": policy.config.cameras,
        "frame_gap": policy.config.frame_gap,
        "laq_hash": policy.config.laq_hash,
    }


def _describe(policy: HLRPPolicy, batches: Any, data: LeRobotDataset, eval_batches: Any) -> str:
    config = policy.config
    parameters = sum(p.numel() for p in policy.backend.parameters() if p.requires_grad)
    held_out = f"{len(eval_batches.items)} held-out" if eval_batches is not None else "no held-out"
    return (
        f"{policy.backend.name}: {parameters / 1e6:.1f}M parameters to train, K={config.codebook_size}, "
        f"S={config.code_seq_len}, frame gap {config.frame_gap}, camera {config.camera}\n"
        f"{data.repo_id}: {len(batches.items)} labelled frames of {data.num_episodes} episodes to train on, {held_out}"
    )


def main() -> None:
    run_command(TrainCodesCommand, train)


if __name__ == "__main__":
    main()
