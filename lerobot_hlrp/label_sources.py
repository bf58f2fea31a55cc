"""Where code labels come from while a policy trains: a code table, or a LAQ that labels frame pairs online.

The lookup lives in the policy and not in a saved processor step, so that `--policy.codes` and `--policy.laq` take
effect also when fine-tuning from a saved policy.

Shape legend: B batch, T frames in time, S code positions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lerobot.utils.constants import OBS_PREFIX
from torch import Tensor

from hlrp_core.expectation import expect
from lerobot_hlrp.batch import Batch
from lerobot_hlrp.fingerprint import dataset_fingerprint
from lerobot_hlrp.frame_gap import is_same_time
from lerobot_hlrp.hub_folder import fetch_laq
from lerobot_hlrp.log_filters import report_short_episodes

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

    from hlrp_core.laq.code_provider import CodeProvider
    from hlrp_core.laq.code_table import CodeTable
    from hlrp_core.laq.quantizer import LatentActionQuantizer
    from lerobot_hlrp.policy_config import HLRPConfig


logger = logging.getLogger(__name__)


class LabelSource(Protocol):
    """Codes for the samples of a LeRobot batch.

    Attributes:
        title: what it is, for messages.
        laq_id: name of the LAQ that made the labels.
        facts: what the source fixes about a policy that learns from it, by the names of the policy's settings.
        span: frames from the first to the last that a label is made from.
    """

    title: str
    laq_id: str
    facts: dict[str, Any]
    span: int

    def check_dataset(self, config: HLRPConfig, meta: LeRobotDatasetMetadata) -> None:
        """Raises:
        ValueError: the source is not of this dataset.
        """
        ...

    def label(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, S]` long, and `[B]` bool whether they may supervise.

        Args:
            frames: `[B, T, H, W, 3]` uint8 of the LAQ's camera.
        """
        ...


class TableLabels:
    """Labels by the global frame index."""

    def __init__(self, table: CodeTable, path: str):
        self.table = table
        self.title = f"code table {path}"
        self.laq_id = table.laq_id
        self.facts = _facts(table, table.laq_hash)
        self.span = table.frame_gap * (table.header.num_frames - 1)

    def check_dataset(self, config: HLRPConfig, meta: LeRobotDatasetMetadata) -> None:
        camera = self.table.header.camera
        is_renamed = config.camera not in meta.features  # then --rename_map decides what this camera is
        expect(
            camera == config.camera or is_renamed,
            "camera",
            f"{config.camera}, which the policy sees",
            f"{camera} in {self.title}",
            "Set --policy.camera to the camera that was labelled, or label the other one.",
        )
        self.table.check_dataset(
            dataset_id=meta.repo_id, fingerprint=dataset_fingerprint(meta), num_frames=meta.total_frames
        )

    def label(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        expect(
            batch.get("index") is not None,
            "index",
            "the global frame index [B] in the batch, by which the code table is looked up",
            None,
            "Pass batches of a LeRobotDataset.",
        )
        codes, valid = self.table.provide_codes(index=batch["index"].flatten().cpu())
        return codes.to(frames.device), valid.to(frames.device)


class OnlineLabels:
    """Labels of a frozen LAQ on the frames of the batch.

    It is no part of the policy's modules: its weights are neither trained nor saved with the policy.

    Args:
        frame_gap: between the frames that it is given, where they are another number of frames apart than those it was
            trained on, as in a dataset with another frame rate.
    """

    def __init__(self, laq: LatentActionQuantizer, name: str, camera: str, *, frame_gap: int | None = None):
        self.laq = laq.eval().requires_grad_(False)
        self.camera = camera
        self.title = f"LAQ {name}"
        self.laq_id = name_laq(name)
        frame_gap = frame_gap or laq.frame_gap
        self.facts = {**_facts(laq, laq.weights_hash()), "frame_gap": frame_gap}
        self.num_frames = laq.config.num_frames
        self.span = frame_gap * (self.num_frames - 1)
        if frame_gap != laq.frame_gap:
            logger.info("%s labels frames %d apart; it was trained on %d", self.title, frame_gap, laq.frame_gap)

    def check_dataset(self, config: HLRPConfig, meta: LeRobotDatasetMetadata) -> None:
        """A LAQ labels any dataset."""

    def label(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        expect(
            frames.shape[1] == self.num_frames,
            self.camera,
            f"{self.num_frames} frames, {self.facts['frame_gap']} apart, for {self.title}",
            f"{frames.shape[1]}",
            "Build the dataset with the policy's observation_delta_indices, as lerobot-train does.",
        )
        is_pad = read_padding(batch, self.camera, size=frames.shape[:2])
        codes, valid = self.laq.to(frames.device).provide_codes(frames=frames)
        return codes, valid & ~is_pad.any(1).to(frames.device)


def name_laq(laq: str) -> str:
    """What labels call a LAQ: its id on the Hub, or the name of its folder, which may lie elsewhere tomorrow."""
    return Path(laq).name if Path(laq).is_dir() else laq


def read_padding(batch: Batch, camera: str, *, size: Sequence[int]) -> Tensor:
    """Which frames of a camera are past the end of the episode, `[B, T]` bool.

    LeRobot's `--rename_map` renames a camera and leaves the name of its padding. It gives all observations the same
    frames, so that the others' paddings tell it as well.

    Args:
        size: (B, T).

    Raises:
        ValueError: the batch does not tell; without it pairs that cross the end of an episode would supervise.
    """
    if (own := batch.get(f"{camera}_is_pad")) is not None:
        return own
    names = [key for key in batch if key.startswith(OBS_PREFIX) and key.endswith("_is_pad")]
    paddings = [batch[name] for name in names if tuple(batch[name].shape) == tuple(size)]
    expect(
        bool(paddings) and all(torch.equal(padding, paddings[0]) for padding in paddings),
        f"{camera}_is_pad",
        f"{list(size)} bool in the batch, or of other observations that agree",
        f"{', '.join(names)}, which do not" if paddings else ", ".join(names) or "no padding at all",
        "Pass batches of a LeRobotDataset with delta_timestamps, as lerobot-train does.",
    )
    return paddings[0]


def _facts(source: CodeProvider, laq_hash: str) -> dict[str, Any]:
    sizes = {name: getattr(source, name) for name in ("codebook_size", "code_seq_len", "frame_gap")}
    return {**sizes, "laq_hash": laq_hash}


# Facts that may change between two runs of a policy, if the user says so.
_FORGETTABLE = ("frame_gap", "laq_hash")


def open_label_source(config: HLRPConfig, meta: LeRobotDatasetMetadata | None) -> LabelSource | None:
    """The source that the config names, checked against the config and the dataset; None where it names none.

    What the source fixes (sizes, frame gap, LAQ) is written into the config where it left that open.

    Raises:
        ValueError: it does not fit the config, the checkpoint or the dataset; both sides are named.
    """
    if meta is not None and config.pretrained_path is None:  # LeRobot has read the frames before it knows their rate
        expect(
            config.frame_gap is not None or config.frame_gap_s is None,
            "frame_gap_s",
            "None on a new run, which records it",
            config.frame_gap_s,
            f"Set --policy.frame_gap, in frames of {meta.repo_id} at {meta.fps:g} per second.",
        )
    source = _open(config)
    if source is None:
        return None
    adopt_facts(config, source, fps=None if meta is None else meta.fps)
    config.label_span = source.span
    if meta is not None:
        lengths = meta.episodes["length"][:]  # every look at the column converts all of it
        longest = max(lengths)
        expect(
            source.span < longest,
            "frame_gap",
            f"labels that span less than {longest} frames, the length of the dataset's longest episode",
            f"{source.span} from {source.title}",
            "Use a LAQ with a smaller frame gap, or a dataset with longer episodes.",
        )
        source.check_dataset(config, meta)
        if config.drop_n_last_frames:
            report_short_episodes(lengths, config.drop_n_last_frames)
    return source


def adopt_facts(
    config: HLRPConfig, source: LabelSource, *, fps: float | None = None, without: Collection[str] = ()
) -> None:
    """Write what the source fixes into the config where it left that open.

    Args:
        without: facts that are left alone.
        fps: frames per second of the dataset that is labelled. With it, and a checkpoint that knows its own, frame gaps
            are compared in seconds.

    Raises:
        ValueError: the config has it otherwise; both sides are named.
    """
    facts = {name: value for name, value in source.facts.items() if name not in without}
    open_facts = dict(facts)
    if fps is not None and config.frame_gap is not None and config.frame_gap_s is not None:
        _check_frame_gap(config.frame_gap_s, open_facts.pop("frame_gap"), source, fps)
    for name, value in open_facts.items():
        wanted = getattr(config, name)
        forget = f", or give the old codes up with --policy.{name}=null" if name in _FORGETTABLE else ""
        expect(
            wanted in (None, value),
            name,
            f"{wanted}, as the policy's settings or its checkpoint have it",
            f"{value} from {source.title}",
            f"Use labels that fit{forget}.",
        )
    for name, value in {**facts, "laq_id": source.laq_id}.items():
        setattr(config, name, value)
    if fps is not None:
        config.frame_gap_s = source.facts["frame_gap"] / fps


def _check_frame_gap(wanted_s: float, frame_gap: int, source: LabelSource, fps: float) -> None:
    """Raises:
    ValueError: the labels' frames lie another time apart than the checkpoint's did.
    """
    flag = "--policy.frame_gap" if isinstance(source, OnlineLabels) else "hlrp-label --frame_gap_s"
    fitting = max(1, round(wanted_s * fps)) if isinstance(source, OnlineLabels) else f"{wanted_s:.6g}"
    expect(
        is_same_time(wanted_s, frame_gap / fps),
        "frame_gap",
        f"frames {wanted_s:.6g} s apart, as the policy's checkpoint has it",
        f"{frame_gap} frames at {fps:g} per second, which are {frame_gap / fps:.6g} s, from {source.title}",
        f"Use labels that fit ({flag}={fitting}), or give the old codes up with --policy.frame_gap=null.",
    )


def _open(config: HLRPConfig) -> LabelSource | None:
    if config.codes is not None:
        from hlrp_core.laq.code_table import CodeTable

        return TableLabels(CodeTable.load(config.codes), config.codes)
    if config.laq is not None:
        from hlrp_core.laq.quantizer import LatentActionQuantizer

        assert config.camera is not None  # settled by validate_features
        laq = LatentActionQuantizer.from_pretrained(fetch_laq(config.laq))
        return OnlineLabels(laq, config.laq, config.camera, frame_gap=config.frame_gap)
    return None


def read_frame_offsets(laq: str, frame_gap: int | None = None) -> list[int]:
    """Where a LAQ wants its frames, relative to t. From its settings alone: LeRobot asks before the policy is built.

    Args:
        frame_gap: by default the one that it was trained with.

    Raises:
        ValueError: no LAQ there.
    """
    from hlrp_core.laq.config import LAQConfig

    path = (Path(laq) if Path(laq).is_dir() else _fetch_settings(laq)) / "config.json"
    expect(
        path.is_file(),
        "laq",
        "folder or Hub id of a LAQ, with a config.json",
        f"{laq}, which has none",
        "Give the folder that hlrp-laq-train wrote.",
    )
    try:
        settings = LAQConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"laq: expected the settings of a LAQ in {path}, got something else ({error}). "
            "Next step: copy or download it anew, or check the name."
        ) from error
    return [(frame_gap or settings.frame_gap) * step for step in range(settings.num_frames)]


@lru_cache(maxsize=8)  # LeRobot asks once for every feature
def _fetch_settings(laq: str) -> Path:
    return fetch_laq(laq, parts=["config.json"])
