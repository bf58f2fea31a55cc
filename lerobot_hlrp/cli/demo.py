"""hlrp-demo: the whole pipeline in one command, from demonstrations to an evaluated policy and a report.

    hlrp-demo --output_dir=outputs/demo
    hlrp-demo --preset=full --output_dir=outputs/demo_full
    hlrp-demo --print_commands=true

Run it again after an interruption: finished steps are kept.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lerobot_hlrp.cli.command import run_command


@dataclass
class DemoConfig:
    # `demo` (25 minutes on two cores), `full` (90 minutes, reaching and pushing) or `smoke` (only runs it all).
    preset: str = "demo"
    # Where checkpoints, report and pictures go.
    output_dir: Path = Path("outputs/demo")
    # Another one gives other scenes to learn from, weights and batches; the evaluation's scenes stay the same.
    seed: int = 0
    # Only print the commands that it would run.
    print_commands: bool = False


def run_demo(config: DemoConfig) -> int:
    """Exit status: 0 when the report is written, 1 when a step failed, 130 when interrupted."""
    from hlrp_core.expectation import expect_choice
    from lerobot_hlrp.demo.pipeline import Pipeline
    from lerobot_hlrp.demo.presets import PRESETS
    from lerobot_hlrp.demo.report import write_report
    from lerobot_hlrp.demo.runner import StepError, StepRunner

    expect_choice("--preset", config.preset, PRESETS)
    pipeline = Pipeline(config.output_dir, PRESETS[config.preset], seed=config.seed)
    steps = pipeline.steps()
    if config.print_commands:
        print("\n".join(shlex.join(step.command) for step in steps))
        return 0
    runner = StepRunner(config.output_dir)
    try:
        runner.run_all(pipeline.common_steps(), pipeline.branches())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again: it picks up where it stopped.")
        return 130
    except StepError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    report = write_report(pipeline, runner, steps)
    print(f"\nThe report: {report}")
    return 0


def main() -> None:
    run_command(DemoConfig, run_demo)


if __name__ == "__main__":
    main()
