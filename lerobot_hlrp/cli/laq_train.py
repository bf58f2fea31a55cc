"""hlrp-laq-train: stage 1, a latent-action quantiser from the frames of a dataset. It needs no actions.

    hlrp-laq-train --dataset.repo_id=user/videos --dataset.root=data/videos --output_dir=outputs/laq \\
        --laq.frame_gap=3 --laq.codebook_size=8 --laq.code_seq_len=4

Reports the reconstruction against a copy of frame t, the use of the codebook, and, where the dataset has actions, how
well they can be read from the codes. The same command again continues a run that was interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs.default import DatasetConfig

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.training import FINAL_METRICS, LAQTrainingConfig
from lerobot_hlrp.cli.command import run_command


@dataclass(kw_only=True)
class TrainLAQCommand(LAQTrainingConfig):
    # The data: frames, and actions for the probe where there are any.
    dataset: DatasetConfig
    # Folder of the LAQ; the same command again continues its run.
    output_dir: Path
    # Camera whose frames it sees. By default the only one.
    camera: str | None = None
    laq: LAQConfig = field(default_factory=LAQConfig)
    # Δ in seconds, instead of `laq.frame_gap` in frames.
    frame_gap_s: float | None = None
    # Share of the episodes, the last ones, that are measured on and not trained on.
    eval_share: float = 0.05
    # What the action probe predicts: the `sum` of the actions over the gap, where they are moves (velocities, deltas),
    # or the `difference` of the actions at its end and start, where they are positions (joint targets).
    probe: str = "sum"


def train(command: TrainLAQCommand) -> int:
    """Exit status: 0, or 130 when interrupted."""
    from hlrp_core.expectation import expect, expect_choice, expect_folder_path
    from hlrp_core.laq.figures import draw_all
    from hlrp_core.laq.quantizer import LatentActionQuantizer
    from hlrp_core.laq.training import check_pairs, make_accelerator, train_laq
    from hlrp_core.run_folder import read_json
    from lerobot_hlrp.dataset_folder import load_whole_dataset
    from lerobot_hlrp.fingerprint import dataset_fingerprint
    from lerobot_hlrp.frame_gap import frames_apart
    from lerobot_hlrp.frame_reader import choose_camera
    from lerobot_hlrp.laq_data import MOTIONS, TuplePlan, cache_frames

    expect_choice("probe", command.probe, MOTIONS)
    expect_folder_path("output_dir", command.output_dir)
    dataset = load_whole_dataset(command.dataset, purpose="a LAQ")
    camera = choose_camera(dataset.meta, command.camera)
    if command.frame_gap_s is not None:
        frame_gap = frames_apart(command.frame_gap_s, dataset.meta.fps, command.dataset.repo_id)
        both = f"{command.frame_gap_s} s and {command.laq.frame_gap} frames"
        is_one = command.laq.frame_gap in (LAQConfig.frame_gap, frame_gap)
        expect(is_one, "frame_gap_s, laq.frame_gap", "one of them", both, "Leave one of them out.")
        command.laq.frame_gap = frame_gap
    plan = TuplePlan(dataset, command.laq, eval_share=command.eval_share, probe=command.probe)
    num_train, num_held_out = len(plan.train_starts), len(plan.test_starts)
    check_pairs(command.laq, command, num_train=num_train, num_held_out=num_held_out)  # before frames are decoded
    fingerprint = dataset_fingerprint(dataset.meta)
    cache = command.output_dir / "frames.npy"
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # it fills the file, the others map it
        frames = cache_frames(dataset, camera, command.laq.image_size, cache, fingerprint=fingerprint)
    training, held_out = plan.build(frames)
    accelerator.print(
        f"{command.dataset.repo_id}: {len(training)} pairs of {camera} to train on, {len(held_out)} held-out"
    )
    import torch

    torch.manual_seed(command.seed)
    laq = LatentActionQuantizer.for_training(command.laq)
    settings = {
        "dataset": fingerprint,
        "camera": camera,
        "eval_share": command.eval_share,
        "probe": command.probe,
    }
    figures = train_laq(
        laq,
        training,
        held_out,
        command,
        output_dir=command.output_dir,
        settings=settings,
        accelerator=accelerator,
    )
    if figures is None:
        return 130
    if not accelerator.is_main_process:
        return 0
    draw_all(laq, held_out, figures, folder=command.output_dir)
    cache.unlink()
    cache.with_suffix(".json").unlink()
    print(summary(read_json(command.output_dir / FINAL_METRICS), command.laq))
    print(f"The LAQ: {command.output_dir}")
    return 0


def summary(figures: dict[str, Any], config: LAQConfig) -> str:
    """The figures as a short table."""
    gain = figures["reconstruction_gain_db"]  # null where nothing moves in the held-out frames
    rows = [
        ("reconstruction, above a copy of frame t", "-" if gain is None else f"{gain:.2f} dB"),
        ("perplexity of the codes", f"{figures['perplexity']:.2f} of {config.codebook_size}"),
        ("entries used", f"{100 * figures['used_share']:.0f}%"),
    ]
    if "action_probe_r2" in figures:
        rows += [
            ("action probe R²", f"{figures['action_probe_r2']:.3f}"),
            ("  of random weights", f"{figures['action_probe_r2_random']:.3f}"),
            ("  of shuffled codes", f"{figures['action_probe_r2_shuffled']:.3f}"),
        ]
    return "\n".join(f"{name:<42}{value}" for name, value in rows)


def main() -> None:
    run_command(TrainLAQCommand, train)


if __name__ == "__main__":
    main()
