"""A recording from the first episode to the last, with interruptions in between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hlrp_core.expectation import expect, expect_at_least, expect_folder_path
from hlrp_core.run_folder import StopRequest
from lerobot_hlrp.recording.episode import RecordingStopped, record_episode
from lerobot_hlrp.recording.layout import DatasetLayout
from lerobot_hlrp.recording.manifest import FIRST_RECORDING_SEED, MANIFEST_PATH, Manifest
from lerobot_hlrp.recording.segment_writer import SegmentWriter
from lerobot_hlrp.recording.sources import Source

# An expert that fails this often in a row will not come round.
_MAX_FAILURES_IN_A_ROW = 50


@dataclass(frozen=True)
class RecordingPlan:
    """num_episodes: kept ones. seed: of the recording; environment seeds start at FIRST_RECORDING_SEED + seed.
    noise: see `record_episode`. keep_failures: keep episodes without success too. Raises ValueError for bad values."""

    root: Path
    layout: DatasetLayout
    num_episodes: int
    seed: int = 0
    noise: float = 0.0
    keep_failures: bool = False

    def __post_init__(self) -> None:
        expect_at_least("--episodes", 1, self.num_episodes)
        expect_at_least("--seed", 0, self.seed)
        is_noise = 0 <= self.noise <= 1
        usual = "Use 0 for none, or about 0.3."
        expect(is_noise, "--noise", "a standard deviation from 0 to 1, in action units", self.noise, usual)

    def settings(self, source: Source) -> dict[str, Any]:
        """Everything that the frames depend on, and nothing else."""
        layout = self.layout
        return {
            **source.settings,
            "fps": layout.fps,
            "video": layout.use_video,
            "with_state": bool(layout.state_names),
            "with_actions": bool(layout.action_names),
            "seed": self.seed,
            "noise": self.noise,
            "keep_failures": self.keep_failures,
        }


def record(plan: RecordingPlan, source: Source) -> tuple[Manifest, bool]:
    """Records what is missing. Returns the manifest and whether all episodes are there (False: it was interrupted).

    The first SIGINT or SIGTERM ends it after saving all whole episodes; a second one ends it at once, and then, as
    after a kill or a power cut, the next run goes on from the last segment. Raises ValueError if the folder holds
    something else, or if the expert keeps failing.
    """
    manifest = _open_manifest(plan, source)
    if manifest.num_episodes == plan.num_episodes:
        return manifest, True
    writer = SegmentWriter(plan.root, plan.layout, manifest)
    with StopRequest() as stop, _progress_bar(plan, manifest) as bar:
        try:
            _record_episodes(plan, source, writer, stop, bar)
        except RecordingStopped:
            writer.commit()
            return manifest, False
        except ValueError:
            writer.commit()  # what was recorded before the trouble is good
            raise
        writer.commit(is_complete=True)
    return manifest, True


def _record_episodes(plan: RecordingPlan, source: Source, writer: SegmentWriter, stop: StopRequest, bar: tqdm) -> None:
    manifest = writer.manifest
    failures_in_a_row = 0
    while manifest.num_episodes < plan.num_episodes:
        env = source.envs[manifest.num_episodes % len(source.envs)]
        seed = manifest.next_seed
        episode = record_episode(env, seed, plan.noise, lambda: stop.requested)
        if episode.is_success or plan.keep_failures:
            writer.add_episode(episode, seed)
            bar.update()
        else:
            writer.drop_episode(seed)
        failures_in_a_row = 0 if episode.is_success else failures_in_a_row + 1
        if failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"The expert failed {failures_in_a_row} times in a row ({episode.task!r}, last seed {seed}), which is "
                "more than bad luck. Next step: Try less --noise, or a longer --env.episode_length."
            )
        bar.set_postfix(frames=manifest.num_frames, failed=len(manifest.failed_seeds), refresh=False)


def _open_manifest(plan: RecordingPlan, source: Source) -> Manifest:
    settings = plan.settings(source)
    expect_folder_path("--dataset.root", plan.root)
    if plan.root.exists() and any(plan.root.iterdir()):
        manifest = Manifest.load(plan.root)
        manifest.require_settings(settings, plan.root)
        if manifest.num_episodes > plan.num_episodes:
            raise ValueError(
                f"--episodes: expected at least the {manifest.num_episodes} that {plan.root} already holds, got "
                f"{plan.num_episodes}. Next step: Choose another --dataset.root for a smaller dataset."
            )
        return manifest
    first_seed = FIRST_RECORDING_SEED + plan.seed
    return Manifest(settings, first_seed=first_seed, next_seed=first_seed)


def _progress_bar(plan: RecordingPlan, manifest: Manifest) -> tqdm:
    return tqdm(total=plan.num_episodes, initial=manifest.num_episodes, desc="Recording", unit="episode")


def summary(plan: RecordingPlan, manifest: Manifest) -> str:
    """What is in the dataset, in a few lines for a person."""
    num_failed = len(manifest.failed_seeds)
    fate = "kept" if plan.keep_failures else "dropped"
    return (
        f"{manifest.num_episodes} episodes, {manifest.num_frames} frames, {manifest.num_tasks} instructions in "
        f"{plan.root}\n"
        f"Environment seeds {manifest.first_seed} to {manifest.next_seed - 1}; without success: {num_failed} ({fate})."
        f" Details: {plan.root / MANIFEST_PATH}"
    )
