"""hlrp-label: the codes of every frame of a dataset, as one file.

    hlrp-label --laq=outputs/laq --dataset.repo_id=user/videos --dataset.root=data/videos --output=codes.safetensors

`lerobot-train --policy.codes=codes.safetensors` learns from it. The same command again continues a run that was
interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lerobot.configs.default import DatasetConfig

from hlrp_core.expectation import expect_at_least, expect_file_path
from lerobot_hlrp.cli.command import run_command


@dataclass(kw_only=True)
class LabelCommand:
    # Folder or Hub id of the LAQ.
    laq: str
    # The data to label.
    dataset: DatasetConfig
    # The file to write.
    output: Path
    # Camera whose frames are labelled. By default the only one.
    camera: str | None = None
    # Δ in seconds, for a dataset with another frame rate than the one that the LAQ was trained on. By default as many
    # frames as there.
    frame_gap_s: float | None = None
    # Frames at once.
    batch_size: int = 64
    # `cpu`, `cuda`, `cuda:1`, ... By default the best there is.
    device: str | None = None

    def __post_init__(self) -> None:
        expect_at_least("batch_size", 1, self.batch_size)


def label(command: LabelCommand) -> int:
    """Exit status: 0, or 130 when interrupted.

    Raises:
        ValueError: no such device, dataset, LAQ or camera, a part of a dataset, or no place for the output.
    """
    from hlrp_core.laq.probes import measure_codebook_use
    from hlrp_core.laq.quantizer import LatentActionQuantizer
    from lerobot_hlrp.dataset_folder import load_whole_dataset
    from lerobot_hlrp.devices import choose_device
    from lerobot_hlrp.frame_gap import frames_apart
    from lerobot_hlrp.frame_reader import choose_camera
    from lerobot_hlrp.hub_folder import fetch_laq
    from lerobot_hlrp.label_sources import name_laq
    from lerobot_hlrp.labelling import label_dataset

    device = choose_device(command.device)
    expect_file_path("output", command.output)
    dataset = load_whole_dataset(command.dataset, purpose="a code table")
    camera = choose_camera(dataset.meta, command.camera)
    laq = LatentActionQuantizer.from_pretrained(fetch_laq(command.laq))
    frame_gap = None
    if command.frame_gap_s is not None:
        frame_gap = frames_apart(command.frame_gap_s, dataset.meta.fps, command.dataset.repo_id)
    laq.to(device)
    table = label_dataset(
        laq,
        dataset,
        camera=camera,
        laq_id=name_laq(command.laq),
        output=command.output,
        frame_gap=frame_gap,
        batch_size=command.batch_size,
    )
    if table is None:
        return 130
    span = table.frame_gap * (table.header.num_frames - 1)
    use = measure_codebook_use(table.codes[table.valid], table.codebook_size)
    print(
        f"{int(table.valid.sum())} of {len(table)} frames labelled: the others have no frame t+{span} in "
        f"their episode. Δ is {table.frame_gap} frames, {table.frame_gap / dataset.meta.fps:.3g} s. "
        f"Perplexity {use.perplexity:.2f} of {table.codebook_size}.\nThe code table: {command.output}"
    )
    return 0


def main() -> None:
    run_command(LabelCommand, label)


if __name__ == "__main__":
    main()
