"""hlrp-train-codes: stage 2 outside `lerobot-train`, measured by real decoding on held-out episodes while it runs.

With `--mode=multitask --action_head=...` it learns actions in the same run, from the datasets that have them.

    hlrp-train-codes --backend=qwen_chat --backbone=Qwen/Qwen3-VL-2B-Instruct --codes=codes.safetensors \\
        --dataset.repo_id=user/videos --dataset.root=data/videos --dataset.eval_split=0.1 \\
        --output_dir=outputs/stage2 --steps=10000 --batch_size=32

Several datasets at once, each with its labels and its weight, here or in a file (`--config_path=run.yaml`):

    hlrp-train-codes ... --datasets='[{repo_id: user/robot, codes: robot.safetensors, weight: 0.3, eval_split: 0.1},
        {repo_id: user/videos, codes: videos.safetensors, weight: 0.7, camera: front}]'

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
from hlrp_core.contract import BackendMode
from hlrp_core.expectation import expect, expect_at_least, expect_folder_path
from hlrp_core.heads import ActionExpertConfig
from hlrp_core.prompting.prompt import PromptConfig
from hlrp_core.training.config import CodeTrainingConfig
from lerobot_hlrp.cli.command import run_command
from lerobot_hlrp.mixing import MixedDataset

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hlrp_core.training import CodeTrainingResult
    from lerobot_hlrp.mixing import LabelledDataset
    from lerobot_hlrp.policy import HLRPPolicy


@dataclass(kw_only=True)
class TrainCodesCommand(CodeTrainingConfig):
    # The data. `--dataset.eval_split` holds episodes out as `lerobot-train` does: the last ones of each task.
    dataset: DatasetConfig | None = None
    # Or several datasets with weights. The first one's cameras are those of the policy. Each has its own `codes`,
    # `camera` and `extra_cameras`, which are not given for all then.
    datasets: list[MixedDataset] = field(default_factory=list)
    # Folder of the run; the same command again continues it.
    output_dir: Path
    # How the core composes it: `hlrp_core.available_backends()`.
    backend: str = "qwen_chat"
    # Hub id or folder of the pretrained vision-language model.
    backbone: str
    # Labels: a code table of this very dataset, or ...
    codes: str | None = None
    # ... folder or Hub id of a LAQ that labels frame pairs while training. Of several datasets those without a table.
    laq: str | None = None
    # Camera whose frames the LAQ saw, such as `top`. By default the only one.
    camera: str | None = None
    # Further cameras that the model sees at time t.
    extra_cameras: list[str] = field(default_factory=list)
    # Dataset frames between the two frames of a pair. By default as in the table or the LAQ.
    frame_gap: int | None = None
    # The same in seconds: the frames of each dataset follow from its frame rate.
    frame_gap_s: float | None = None
    prompt: PromptConfig = field(default_factory=PromptConfig)
    token_scheme: TokenSchemeConfig = field(default_factory=TokenSchemeConfig)
    # Pixels along an image's side, as the backbone sees it. By default as the backbone's processor has it.
    image_size: int | None = None
    # An image as several tiles of `image_size` (SmolVLM backends): sharper, and many times the tokens.
    image_splitting: bool = False
    # What the loss is a mean of (token backends): the whole `completion`, `codes_only`, or `restricted` to the K code
    # rows of the vocabulary at the code positions.
    code_objective: str = "completion"
    # How hidden states become codes (latent-head backends) or vectors: from their `mean`, the `last` one, or by a
    # learned `query`.
    latent_pooling: str = "mean"
    # What is trained of the vocabulary's tables (token backends): `all` of them, or the `code_rows` alone.
    train_vocabulary: str = "all"
    # How codes are read from the model (token backends), in evaluations and in the saved policy: `constrained`,
    # `generate` or `free`.
    decoding: str = "constrained"
    # How vectors are learned (vector backends): `regression` of their mean, or a `flow` that draws them from noise.
    vector_objective: str = "regression"
    # Folder or Hub id of the LAQ whose vectors a vector backend learns, beside a code table that lacks them.
    laq_weights: str | None = None
    # Keep the vision tower as it is.
    freeze_vision: bool = False
    # Keep the whole backbone as it is; what learns are a latent head, or the rows of the code tokens
    # (train_vocabulary=code_rows).
    freeze_backbone: bool = False
    # `mlp`, `flow`, `prefix_flow` or `laq`: what learns actions in mode=multitask.
    action_head: str | None = None
    # Sizes of the action head.
    action_expert: ActionExpertConfig = field(default_factory=ActionExpertConfig)
    # How codes reach the action head: `tokens`, `soft` or `none`; on a vector backend: `vector` or `none`. By default
    # `none` for prefix_flow.
    code_conditioning: str | None = None
    # Codes that a code-conditioned action head trains on: `predicted`, as it will see them, or `teacher`.
    code_source: str = "predicted"
    # Actions predicted at once.
    chunk_size: int = 16
    # Actions run of each chunk before the next is predicted.
    n_action_steps: int = 8
    # Weight of the code loss in mode=multitask.
    codes_loss_weight: float = 1.0
    # Weight of the action loss in mode=multitask.
    actions_loss_weight: float = 1.0
    # Episodes of the (first) dataset that may supervise actions, such as [0,1,2]. By default all.
    action_episodes: list[int] | None = None
    # Instead of a list: the share of its episodes.
    action_episode_share: float | None = None
    # Seed of that draw.
    action_episode_seed: int = 0
    # Of the backbone's weights. Below float32 only where memory demands it.
    backbone_dtype: str = "float32"
    # Samples in a batch, on each device; of all datasets together.
    batch_size: int = 8
    # Processes that load frames; of several datasets each has at least one.
    num_workers: int = 4
    # Held-out samples at most in an evaluation, of each dataset, spread over its held-out episodes; 0 for all of them.
    max_eval_samples: int = 1024
    # `cpu`, `cuda`, `cuda:1`, ... By default the best there is, and with `accelerate launch` one for each process.
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("batch_size", 1, self.batch_size)
        expect_at_least("num_workers", 0, self.num_workers)
        expect_at_least("max_eval_samples", 0, self.max_eval_samples)
        expect(
            self.action_head is None or self.mode == BackendMode.MULTITASK,
            "action_head",
            "mode=multitask beside it, which alone trains one",
            f"mode={self.mode}",
            "Set --mode=multitask, or leave --action_head out.",
        )


def train(command: TrainCodesCommand) -> int:
    """Exit status: 0, or 130 when interrupted."""
    from lerobot.policies.factory import make_pre_post_processors

    from hlrp_core.training import train_codes
    from lerobot_hlrp.mixing import mix_batches, read_held_out, read_training

    wanted = list_datasets(command)
    expect_folder_path("output_dir", command.output_dir)
    accelerator = open_accelerator(command)
    policy, datasets = open_datasets(command, wanted, device=str(accelerator.device))
    loading: dict[str, Any] = {"num_workers": command.num_workers, "device": accelerator.device}
    shard = (accelerator.process_index, accelerator.num_processes)
    if command.datasets:
        batches: Any = mix_batches(datasets, batch_size=command.batch_size, seed=command.seed, shard=shard, **loading)
        sources = batches.sources
    else:
        batches = read_training(
            datasets[0], batch_size=command.batch_size, shuffle_seed=command.seed, shard=shard, **loading
        )
        sources = {datasets[0].title: batches}
    held_out = read_held_out(datasets, command.max_eval_samples, batch_size=command.batch_size, **loading)
    if accelerator.is_main_process:
        print(_describe(policy))
        for dataset in datasets:
            print(_describe_data(dataset, sources, held_out, batches.shares if command.datasets else None))
    processors = make_pre_post_processors(policy.config, dataset_stats=datasets[0].meta.stats)

    def save_model(folder: Path) -> None:
        policy.save_pretrained(folder)
        for processor in processors:
            processor.save_pretrained(folder)

    result = train_codes(
        policy.backend,
        batches,
        command,
        output_dir=command.output_dir,
        eval_batches=(held_out if command.datasets else next(iter(held_out.values()))) if held_out else None,
        settings=_settings(command, datasets),
        save_model=save_model,
        accelerator=accelerator,
    )
    if accelerator.is_main_process and result.is_finished:
        _report(result)
    return 0 if result.is_finished else 130


def open_accelerator(command: TrainCodesCommand) -> Accelerator:
    """On the device that the command names.

    Raises:
        ValueError: there is none such, or accelerate has chosen another one.
    """
    import torch

    from hlrp_core.training.code_training import make_accelerator
    from lerobot_hlrp.devices import choose_device, is_same_device

    if command.device is None:
        return make_accelerator(command)
    wanted = choose_device(command.device)
    if wanted.index is not None:  # a single process computes on the current one
        torch.accelerator.set_device_index(wanted.index)
    accelerator = make_accelerator(command, cpu=wanted.type == "cpu")
    # with several processes `cuda` is the kind of device, of which each has its own
    is_kind = wanted.index is None and accelerator.num_processes > 1
    expect(
        wanted.type == accelerator.device.type if is_kind else is_same_device(wanted, accelerator.device),
        "device",
        f"{accelerator.device}, which accelerate has chosen",
        command.device,
        "Leave --device out, and choose devices with `accelerate launch` and CUDA_VISIBLE_DEVICES.",
    )
    return accelerator


def list_datasets(command: TrainCodesCommand) -> list[MixedDataset]:
    """The datasets that the command names: one of them is a mix of one.

    Raises:
        ValueError: none or both ways are used, or settings of one dataset are given for several.
    """
    from lerobot_hlrp.mixing import check_mix

    expect(
        (command.dataset is None) == bool(command.datasets),
        "data",
        "one dataset (--dataset.repo_id=...) or several (--datasets='[{repo_id: ..., weight: ...}, ...]')",
        "neither" if command.dataset is None else "both",
        "Use one of the two.",
    )
    expect(
        command.frame_gap is None or command.frame_gap_s is None,
        "frame_gap, frame_gap_s",
        "one of them",
        f"both ({command.frame_gap} and {command.frame_gap_s})",
        "Leave one of them out.",
    )
    if command.dataset is not None:
        own = {name: getattr(command, name) for name in ("codes", "camera", "extra_cameras")}
        return [MixedDataset(**vars(command.dataset), **own)]
    common = [name for name in ("codes", "camera", "extra_cameras", "frame_gap") if getattr(command, name)]
    expect(
        not common,
        "datasets",
        "settings of a dataset within its entry",
        ", ".join(f"--{name}" for name in common),
        "Write them into the entries of --datasets; a frame gap for all is --frame_gap_s.",
    )
    check_mix(command.datasets, has_laq=command.laq is not None)
    return command.datasets


def open_datasets(
    command: TrainCodesCommand, wanted: list[MixedDataset], *, device: str
) -> tuple[HLRPPolicy, list[LabelledDataset]]:
    """A new policy, made for the first dataset, and all of them opened.

    Raises:
        ValueError: a dataset, its labels and the others' do not fit each other.
    """
    from lerobot_hlrp.dataset_folder import load_metadata
    from lerobot_hlrp.foundation_batches import load_datasets
    from lerobot_hlrp.mixing import (
        LabelledDataset,
        check_labels,
        check_supervision,
        choose_frame_gap,
        make_preprocessor,
        open_reader,
        settle_frame_gap,
    )
    from lerobot_hlrp.policy_types import make_code_policy

    policy, first, opened = None, None, []
    for settings in wanted:
        meta = load_metadata(settings)
        laq = None if command.datasets and settings.codes else command.laq
        gap = choose_frame_gap(settings, meta.fps, frame_gap=command.frame_gap, frame_gap_s=command.frame_gap_s)
        if policy is None:
            own = {name: getattr(settings, name) for name in ("codes", "camera", "extra_cameras")}
            common = {name: getattr(command, name) for name in _POLICY_SETTINGS}
            policy, meta = make_code_policy(
                settings, command.backend, device=device, laq=laq, frame_gap=gap, **own, **common
            )
            reader, first = policy.reader, meta  # its statistics may have been narrowed to some episodes
        else:
            reader = open_reader(policy, settings, meta, first=first, laq=laq, frame_gap=gap)
        assert reader.config.frame_gap is not None  # the labels have settled it
        data = load_datasets(settings, reader.config)
        preprocess = make_preprocessor(reader.config, meta, first)
        opened.append(LabelledDataset(settings, meta, reader, reader.config.frame_gap, *data, preprocess))
    assert policy is not None
    check_labels(opened)
    check_supervision(opened[0])
    settle_frame_gap(policy, opened)
    return policy, opened


_POLICY_SETTINGS = (
    *("backbone", "prompt", "token_scheme", "image_size", "image_splitting", "code_objective"),
    *("latent_pooling", "vector_objective", "laq_weights", "train_vocabulary", "freeze_vision", "freeze_backbone"),
    *("decoding", "backbone_dtype", "dtype"),
    *("mode", "action_head", "action_expert", "code_conditioning", "code_source", "chunk_size", "n_action_steps"),
    *("codes_loss_weight", "actions_loss_weight"),
    *("action_episodes", "action_episode_share", "action_episode_seed"),
)


def _settings(command: TrainCodesCommand, datasets: list[LabelledDataset]) -> dict[str, Any]:
    """What a continued run must have in common with its beginning, beside the core's settings."""
    common: dict[str, Any] = {"batch_size": command.batch_size, "backbone": command.backbone}
    if command.mode == BackendMode.MULTITASK:
        chosen = ("action_episodes", "action_episode_share", "action_episode_seed")
        common |= {name: getattr(command, name) for name in chosen}
        common["actions"] = [dataset.title for dataset in datasets if dataset.settings.actions]
    if not command.datasets:
        return {**common, **_data_settings(datasets[0])}
    weights = {f"weight of {dataset.title}": dataset.settings.weight for dataset in datasets}
    of_data = {f"data of {dataset.title}": _data_settings(dataset) for dataset in datasets}
    return {**common, "datasets": [dataset.title for dataset in datasets], **weights, **of_data}


def _data_settings(dataset: LabelledDataset) -> dict[str, Any]:
    settings, config = dataset.settings, dataset.reader.config
    return {
        "dataset": settings.repo_id,
        "episodes": settings.episodes,
        "eval_split": settings.eval_split,
        "cameras": config.cameras,
        "frame_gap": dataset.frame_gap,
        "laq_hash": config.laq_hash,
    }


def _describe(policy: HLRPPolicy) -> str:
    config = policy.config
    parameters = sum(p.numel() for p in policy.backend.parameters() if p.requires_grad)
    return (
        f"{policy.backend.name}: {parameters / 1e6:.1f}M parameters to train, K={config.codebook_size}, "
        f"S={config.code_seq_len}"
    )


def _describe_data(
    dataset: LabelledDataset, sources: dict[str, Any], held_out: dict[str, Any], shares: dict[str, float] | None
) -> str:
    title, config = dataset.title, dataset.reader.config
    held_out_text = f"{len(held_out[title].items)} held-out" if title in held_out else "no held-out"
    share = f"{100 * shares[title]:.1f}% of the samples from " if shares is not None else ""
    return (
        f"{title}: {share}{len(sources[title].items)} labelled frames of {dataset.training.num_episodes} episodes to "
        f"train on, {held_out_text}; camera "
        f"{config.camera}, frame gap {dataset.frame_gap} ({dataset.frame_gap_s:.3g} s)"
    )


def _report(result: CodeTrainingResult) -> None:
    if any(result.drawn):  # sources with names
        width = max(map(len, result.drawn))
        print("Drawn:")
        for source, of in result.drawn.items():
            share = f"{100 * of['share']:.2f}%"
            print(f"  {source:<{width}}  {of['samples']:>10} samples {share:>8}  {of['epoch']} whole passes")
    for source, evaluation in result.by_source.items():
        print(f"{source}:\n{evaluation.as_table()}")
    if result.evaluation is not None:
        print(("All together:\n" if result.by_source else "") + result.evaluation.as_table())
    print(f"The model: {result.folder}")


def main() -> None:
    run_command(TrainCodesCommand, train)


if __name__ == "__main__":
    main()
