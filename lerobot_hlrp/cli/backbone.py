"""hlrp-backbone: a randomly initialised checkpoint of a real model class, in the Hugging Face layout.

    hlrp-backbone --family=qwen3_vl --size=tiny --output=outputs/backbone
    hlrp-backbone --family=smolvlm --size=tiny --output=outputs/backbone
    hlrp-backbone --family=qwen3_vl --size=small --output=outputs/backbone --processor=<folder of a real processor>

It stands in for a pretrained model where no hub can be reached, for tests, and for learning small worlds from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hlrp_core.expectation import expect_choice, expect_folder_path
from lerobot_hlrp.cli.command import run_command


@dataclass(kw_only=True)
class BackboneCommand:
    # Folder to write; new or empty.
    output: Path
    # `qwen3_vl` or `smolvlm`.
    family: str = "qwen3_vl"
    # `tiny` (about a million parameters) or `small`.
    size: str = "tiny"
    # Folder with a real processor of the family, whose vocabulary the model then has. By default a small one is made.
    processor: Path | None = None
    # Of the weights: equal seeds give equal files.
    seed: int = 0


def make_backbone(command: BackboneCommand) -> None:
    from hlrp_core.backbones.random_checkpoint import FAMILIES, SIZES, describe_checkpoint, write_random_checkpoint

    expect_choice("family", command.family, FAMILIES)
    expect_choice("size", command.size, SIZES)
    expect_folder_path("output", command.output)
    write_random_checkpoint(
        command.output,
        family=command.family,
        size=command.size,
        processor=command.processor,
        seed=command.seed,
    )
    print(describe_checkpoint(command.output))


def main() -> None:
    run_command(BackboneCommand, make_backbone)


if __name__ == "__main__":
    main()
