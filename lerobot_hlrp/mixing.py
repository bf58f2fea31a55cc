"""Several LeRobotDatasets as one mix: each with its own labels, camera and frame rate.

What must be equal is the meaning of the codes: one LAQ, one K, one S, and pairs of frames equally far apart in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lerobot.configs.default import DatasetConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from hlrp_core.expectation import expect
from lerobot_hlrp.action_labels import check_statistics
from lerobot_hlrp.frame_gap import frames_apart, is_same_time

if TYPE_CHECKING:
    from lerobot.configs import PolicyFeature
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
    from lerobot.processor import PolicyProcessorPipeline

    from hlrp_core.training import MixedBatches
    from lerobot_hlrp.batch import BatchReader
    from lerobot_hlrp.foundation_batches import FoundationBatches
    from lerobot_hlrp.policy import HLRPPolicy
    from lerobot_hlrp.policy_config import HLRPConfig


@dataclass(kw_only=True)
class MixedDataset(DatasetConfig):
    """One dataset of a mix: LeRobot's own settings (`repo_id`, `root`, `episodes`, `eval_split`, ...) and these."""

    # In the log. By default the `repo_id`.
    name: str | None = None
    # How often it is drawn: its share of the samples is its weight over the sum of all, whatever its size.
    weight: float | None = None
    # Labels: a code table of this very dataset. Without it the mix's LAQ labels it online.
    codes: str | None = None
    # Camera whose frames the LAQ saw, such as `top`. By default the only one.
    camera: str | None = None
    # Further cameras that the model sees at time t.
    extra_cameras: list[str] = field(default_factory=list)
    # Whether its actions supervise, too (mode=multitask). The first dataset's always do; set it for others of the same
    # robot alone, as they are normalised by the statistics of the first.
    actions: bool = False
    # Δ in seconds. By default that of the whole mix, or as in the table or the LAQ. Where every dataset has one, they
    # may differ.
    frame_gap_s: float | None = None

    @property
    def title(self) -> str:
        return self.name or self.repo_id


@dataclass(frozen=True)
class LabelledDataset:
    """One dataset of a mix, opened.

    Args:
        settings: what the user said.
        meta: of the dataset.
        reader: of its batches, with its labels.
        frame_gap: Δ in its frames.
        training, held_out: its episodes.
        preprocess: normalises state and actions, where they are seen.
    """

    settings: MixedDataset
    meta: LeRobotDatasetMetadata
    reader: BatchReader
    frame_gap: int
    training: LeRobotDataset
    held_out: LeRobotDataset | None
    preprocess: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]] | None = None

    @property
    def title(self) -> str:
        return self.settings.title

    @property
    def frame_gap_s(self) -> float:
        return self.frame_gap / self.meta.fps


def check_mix(datasets: Sequence[MixedDataset], *, has_laq: bool) -> None:
    """Args:
        has_laq: datasets without a code table are labelled online.

    Raises:
        ValueError: a weight is missing or not above 0, two datasets have one name, one has no labels or is streamed.
    """
    streamed = [dataset.title for dataset in datasets if dataset.streaming]
    expect(
        not streamed,
        "streaming",
        "datasets on disk, of which samples are drawn in any order",
        f"streaming=true for {', '.join(streamed)}",
        "Leave it out.",
    )
    bare = [dataset.title for dataset in datasets if dataset.codes is None]
    expect(
        has_laq or not bare,
        "labels",
        "`codes` (a code table) for each dataset, or --laq=<folder or Hub id> for those without",
        f"none for {', '.join(bare)}",
        "Make code tables with hlrp-label.",
    )
    expect(
        not has_laq or bool(bare),
        "labels",
        "a dataset without `codes` for --laq to label",
        "--laq beside code tables of all datasets",
        "Leave --laq out, or the `codes` of the datasets that it is to label.",
    )
    titles = [dataset.title for dataset in datasets]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    expect(not twice, "datasets", "names of their own", f"several of {', '.join(twice)}", "Give each a `name`.")
    missing = [dataset.title for dataset in datasets if dataset.weight is None]
    expect(
        not missing or len(datasets) == 1,
        "datasets",
        "a weight for each, as a dataset's size says little of its worth",
        f"none for {', '.join(missing)}",
        "Give each a `weight`; its share of the samples is its weight over the sum of all.",
    )
    wrong = [f"{d.title}: {d.weight}" for d in datasets if d.weight is not None and not 0 < d.weight < float("inf")]
    expect(not wrong, "weight", "a number above 0", ", ".join(wrong), "Leave a dataset out that is not to be drawn.")


def open_reader(
    policy: HLRPPolicy,
    settings: MixedDataset,
    meta: LeRobotDatasetMetadata,
    *,
    first: LeRobotDatasetMetadata,
    **labels: Any,
) -> BatchReader:
    """A reader for one more dataset than the policy was made with: its cameras, its labels.

    Args:
        first: the dataset that the policy was made with.
        labels: the policy's settings `laq` and `frame_gap`.

    Raises:
        ValueError: the dataset lacks the camera, the state or the actions, or the labels do not fit it.
    """
    from lerobot.utils.feature_utils import dataset_to_policy_features

    from lerobot_hlrp.batch import ActionSizes, BatchReader
    from lerobot_hlrp.label_sources import open_label_source

    config = copy.copy(policy.config)  # no deep one: LeRobot keeps all that it knows of the first dataset in there
    of_the_first = ("codebook_size", "code_seq_len", "laq_id", "laq_hash", "frame_gap", "frame_gap_s", "label_span")
    for name in of_the_first:  # adopted from this dataset's labels; `check_labels` compares them
        setattr(config, name, None)
    own = {"codes": settings.codes, "camera": settings.camera, "extra_cameras": list(settings.extra_cameras)}
    for name, value in {**own, **labels}.items():
        setattr(config, name, value)
    features = dataset_to_policy_features(meta.features)
    without_actions = None
    if policy.config.learns_actions:
        head = policy.backend.action_head
        assert head is not None
        if settings.actions:
            _expect_same_robot(policy.config, features, settings.title)
        else:
            config.mode = "codes"
            without_actions = ActionSizes(head.config.chunk_size, head.config.action_dim, head.config.state_dim)
            if config.prompt.state_text:  # the head sees the very state that the prompt shows
                _expect_same_width(OBS_STATE, policy.config.robot_state_feature, features, settings.title)
    config.input_features = features
    config.__post_init__()
    config.validate_features()
    if config.extra_cameras:
        policy.backend.prompting.check_length_sources(len(config.cameras))
    state_dim = policy.reader.state_dim
    if not config.learns_actions:
        check_statistics(meta.stats, config.normalized_features(), config.normalization_mapping)
        state = config.robot_state_feature if config.prompt.state_text else None
        state_dim = 0 if state is None else state.shape[0]
    source = open_label_source(config, meta)
    return BatchReader(config, state_dim=state_dim, labels=source, without_actions=without_actions)


def _expect_same_robot(config: HLRPConfig, features: dict[str, PolicyFeature], title: str) -> None:
    """Raises:
    ValueError: `features` of a dataset hold other actions, or another state, than those of `config`.
    """
    _expect_same_width(ACTION, config.action_feature, features, title)
    if config.robot_state_feature is not None:
        _expect_same_width(OBS_STATE, config.robot_state_feature, features, title)


def _expect_same_width(name: str, wanted: PolicyFeature | None, features: dict[str, PolicyFeature], title: str) -> None:
    assert wanted is not None
    have = features.get(name)
    expect(
        have is not None and have.shape == wanted.shape,
        f"{name} of {title}",
        f"width {wanted.shape[0]}, as in the first dataset",
        "none" if have is None else f"width {have.shape[0]}",
        "Leave `actions` out of its entry: then it teaches codes alone."
        if name == ACTION
        else "Use data of one robot, or leave the state out of the prompt.",
    )


def make_preprocessor(
    config: HLRPConfig, meta: LeRobotDatasetMetadata, first: LeRobotDatasetMetadata
) -> PolicyProcessorPipeline[dict[str, Any], dict[str, Any]] | None:
    """What normalises the states, and the actions, of one dataset; None where nothing of both is seen.

    States in the prompt of a dataset that teaches codes go by its own statistics: another robot's say nothing of it.
    Actions, and the states beside them, go by those of the first dataset, as the trained policy will.

    Args:
        meta: of this dataset.
        first: of the first one.
    """
    from lerobot.policies.factory import make_pre_post_processors

    if not config.reads_state:
        return None
    stats = first.stats if config.learns_actions else meta.stats
    return make_pre_post_processors(config, dataset_stats=stats)[0]  # type: ignore[arg-type]


def check_labels(datasets: Sequence[LabelledDataset]) -> None:
    """Raises:
    ValueError: the codes of two datasets do not mean the same.
    """
    first = datasets[0]
    for other in datasets[1:]:
        for name in ("codebook_size", "code_seq_len", "laq_hash"):
            one, its = (getattr(dataset.reader.config, name) for dataset in (first, other))
            expect(
                one == its,
                f"{name} of the labels",
                f"{one} in all datasets, as in {first.title}",
                f"{its} in {other.title}",
                "Label all datasets with one LAQ: codes of different ones mean different things.",
            )
        expect(
            is_same_time(first.frame_gap_s, other.frame_gap_s) or all(d.settings.frame_gap_s for d in datasets),
            "frame_gap",
            f"frames {first.frame_gap_s:.6g} s apart in all datasets, as in {first.title}",
            f"{_describe_gap(other)} in {other.title}",
            f"Label it anew (hlrp-label --frame_gap_s={first.frame_gap_s:.6g}), set --frame_gap_s for labels of "
            "--laq, or, where they are to differ, give every dataset its `frame_gap_s`.",
        )


def check_supervision(dataset: LabelledDataset) -> None:
    """Raises:
    ValueError: the episodes that may supervise actions are not among those that are trained on.
    """
    chosen = dataset.reader.action_episodes
    if chosen is None:
        return
    training = dataset.training.episodes
    trained = range(dataset.meta.total_episodes) if training is None else training
    expect(
        not set(chosen.tolist()).isdisjoint(trained),
        "action_episodes",
        f"episodes of {dataset.title} that are trained on",
        f"{chosen.tolist()}, of which none is",
        "Choose others: `episodes` may leave them out, and `eval_split` holds the last ones of each task out.",
    )


def settle_frame_gap(policy: HLRPPolicy, datasets: Sequence[LabelledDataset]) -> None:
    """Let the policy's settings name a frame gap only if it learns from one."""
    if not all(is_same_time(datasets[0].frame_gap_s, other.frame_gap_s) for other in datasets):
        policy.config.frame_gap = policy.config.frame_gap_s = None


def mix_batches(datasets: Sequence[LabelledDataset], *, batch_size: int, seed: int, **loading: Any) -> MixedBatches:
    """Batches of all datasets' training episodes.

    Args:
        batch_size: samples of a step, of all datasets together.
        seed: of the draws between the datasets, and of the order within each.
        loading: further arguments of `FoundationBatches`; the processes that load frames are shared out by weight, and
            each dataset has at least one of them.
    """
    from hlrp_core.training import MixedBatches

    weights = {dataset.title: dataset.settings.weight or 1.0 for dataset in datasets}
    num_workers = loading.pop("num_workers", 0)
    sources = {}
    for dataset in datasets:
        share = weights[dataset.title] / sum(weights.values())
        sources[dataset.title] = read_training(
            dataset,
            batch_size=max(1, round(batch_size * share)),
            shuffle_seed=seed,
            num_workers=max(1, round(num_workers * share)) if num_workers else 0,
            **loading,
        )
    return MixedBatches(sources, weights, batch_size=batch_size, seed=seed)


def read_training(dataset: LabelledDataset, **settings: Any) -> FoundationBatches:
    """Args:
    settings: of `FoundationBatches`.
    """
    from lerobot_hlrp.foundation_batches import FoundationBatches

    return FoundationBatches(dataset.training, dataset.reader, preprocess=dataset.preprocess, **settings)


def read_held_out(datasets: Sequence[LabelledDataset], most: int, **settings: Any) -> dict[str, FoundationBatches]:
    """The held-out episodes of the datasets that have some.

    Args:
        most: samples of each dataset; 0 for all.
        settings: of `FoundationBatches`.
    """
    from lerobot_hlrp.foundation_batches import FoundationBatches, labelled_items, spread

    found = {}
    for dataset in datasets:
        if dataset.held_out is not None:
            batches = FoundationBatches(dataset.held_out, dataset.reader, preprocess=dataset.preprocess, **settings)
            batches.items = spread(labelled_items(dataset.held_out, dataset.reader, with_codes=True), most)
            found[dataset.title] = batches
    return found


def choose_frame_gap(
    settings: MixedDataset, fps: float, *, frame_gap: int | None, frame_gap_s: float | None
) -> int | None:
    """Δ in frames of a dataset, where the user said it; None leaves it to the labels.

    Args:
        frame_gap, frame_gap_s: of the whole run, in frames and in seconds; the dataset's own seconds go first.
    """
    seconds = settings.frame_gap_s if settings.frame_gap_s is not None else frame_gap_s
    return frame_gap if seconds is None else frames_apart(seconds, fps, settings.title)


def _describe_gap(dataset: LabelledDataset) -> str:
    gap = f"{dataset.frame_gap} frames at {dataset.meta.fps:g} per second"
    return f"{gap}, which are {dataset.frame_gap_s:.6g} s,"
