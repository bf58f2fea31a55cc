"""hlrp-record: episodes of a scripted expert as a LeRobotDataset.

    hlrp-record --env.type=hlrp_tabletop --env.task=reach --dataset.repo_id=local/reach --episodes=3000
    hlrp-record --env.type=hlrp_tabletop --env.task=reach,push --dataset.repo_id=local/tabletop \\
        --dataset.root=outputs/tabletop --episodes=3000
    MUJOCO_GL=egl hlrp-record --env.type=metaworld --env.task=reach-v3 --dataset.repo_id=local/reach-v3 --episodes=50

With several tasks the episodes take turns; a task that is named twice gets twice as many. Run the same command again
after an interruption, or with more episodes: it goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import HF_LEROBOT_HOME

import lerobot_hlrp.envs  # noqa: F401 (registers hlrp_tabletop)
from lerobot_hlrp.cli.command import run_command


@dataclass(kw_only=True)
class RecordedDataset:
    # Name of the dataset, `user/name`.
    repo_id: str
    # Folder; by default LeRobot's own place for `repo_id`.
    root: Path | None = None
    # Frames per second that the dataset claims; by default the environment's.
    fps: int | None = None
    # Frames as video, or as PNG images: exact, and faster to read in random order while they are small. By default
    # images for the tabletop and video for Meta-World.
    video: bool | None = None
    # Upload the finished dataset to the Hub as `repo_id`.
    push_to_hub: bool = False
    # Upload it for you alone.
    private: bool = False


@dataclass(kw_only=True)
class RecordCommand:
    # `hlrp_tabletop` or `metaworld`, with its settings.
    env: EnvConfig
    # Where to.
    dataset: RecordedDataset
    # How many to keep.
    episodes: int = 100
    # Recordings with other seeds show other scenes. Environments are seeded from 1000000 + seed on, one seed per
    # episode, so that none is ever among those that `lerobot-eval` uses (from its own --seed=1000 on).
    seed: int = 0
    # Standard deviation of noise on the executed action, in action units; the recorded one stays the expert's.
    noise: float = 0.0
    # Keep the episodes in which the expert failed.
    keep_failures: bool = False
    # False: no action column, as in video that nobody labelled.
    with_actions: bool = True
    # False: no state column.
    with_state: bool = True


def record_dataset(command: RecordCommand) -> int:
    """Exit status: 0 when all episodes are there, 130 when interrupted."""
    from lerobot_hlrp.recording.layout import DatasetLayout
    from lerobot_hlrp.recording.session import RecordingPlan, record, summary
    from lerobot_hlrp.recording.sources import make_source

    dataset = command.dataset
    source = make_source(command.env)
    layout = DatasetLayout(
        robot_type=source.name,
        fps=source.fps if dataset.fps is None else dataset.fps,
        image_shape=source.image_shape,
        state_names=source.state_names if command.with_state else (),
        action_names=source.action_names if command.with_actions else (),
        use_video=source.use_video if dataset.video is None else dataset.video,
    )
    plan = RecordingPlan(
        root=HF_LEROBOT_HOME / dataset.repo_id if dataset.root is None else dataset.root,
        layout=layout,
        num_episodes=command.episodes,
        seed=command.seed,
        noise=command.noise,
        keep_failures=command.keep_failures,
    )
    manifest, is_complete = record(plan, source)
    print(summary(plan, manifest))
    if not is_complete:
        print("Interrupted. Run the same command again: it goes on from here.")
        return 130
    if dataset.push_to_hub:
        _push(dataset, plan.root)
    return 0


def _push(dataset: RecordedDataset, root: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    LeRobotDataset(dataset.repo_id, root=root).push_to_hub(private=dataset.private)


def main() -> None:
    run_command(RecordCommand, record_dataset)


if __name__ == "__main__":
    main()
