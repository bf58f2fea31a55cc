"""Where code labels come from while a policy trains: a code table, or a LAQ that labels frame pairs online.

The lookup lives in the policy and not in a saved processor step, so that `--policy.codes` and `--policy.laq` take
effect also when fine-tuning from a saved policy.

Shape legend: B batch, T frames in time, S code positions.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lerobot_hlrp.batch import Batch
from lerobot_hlrp.expectation import expect

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

    from hlrp_core.laq.code_table import CodeTable
    from hlrp_core.laq.quantizer import LatentActionQuantizer
    from lerobot_hlrp.policy_config import HLRPConfig


class LabelSource(Protocol):
    """Codes for the samples of a LeRobot batch.

    Attributes:
        title: what it is, for messages.
        laq_id: name of the LAQ that made the labels, as far as it is known.
        facts: what the source fixes about a policy that learns from it, by the names of the policy's settings.
    """

    title: str
    laq_id: str | None
    facts: dict[str, Any]

    def check_dataset(self, meta: LeRobotDatasetMetadata) -> None:
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
        self.laq_id = getattr(table, "laq_id", None)
        self.facts = {
            "codebook_size": table.codebook_size,
            "code_seq_len": table.code_seq_len,
            "frame_gap": table.frame_gap,
            "laq_hash": table.laq_hash,
        }

    def check_dataset(self, meta: LeRobotDatasetMetadata) -> None:
        raise NotImplementedError

    def label(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        if batch.get("index") is None:
            raise ValueError(
                "index: expected the global frame index [B] in the batch, got none. Next step: pass batches of a "
                "LeRobotDataset; the code table is looked up by it."
            )
        codes, valid = self.table.lookup(batch["index"].flatten().cpu())
        return codes.to(frames.device), valid.to(frames.device)


class OnlineLabels:
    """Labels of a frozen LAQ on the frame pairs of the batch.

    It is no part of the policy's modules: its weights are neither trained nor saved with the policy.
    """

    def __init__(self, laq: LatentActionQuantizer, name: str, camera: str):
        self.laq = laq.eval().requires_grad_(False)
        self.camera = camera
        self.title = f"LAQ {name}"
        self.laq_id = Path(name).name if Path(name).is_dir() else name
        self.facts = {
            "codebook_size": laq.codebook_size,
            "code_seq_len": laq.code_seq_len,
            "frame_gap": laq.frame_gap,
            "laq_hash": laq.weights_hash(),
        }

    def check_dataset(self, meta: LeRobotDatasetMetadata) -> None:
        """A LAQ labels any dataset."""

    def label(self, batch: Batch, frames: Tensor) -> tuple[Tensor, Tensor]:
        if frames.shape[1] < 2:
            raise ValueError(
                f"{self.camera}: expected frames t and t+{self.facts['frame_gap']} for {self.title}, got frame t "
                "alone. Next step: build the dataset with the policy's observation_delta_indices, as lerobot-train "
                "does."
            )
        self.laq.to(frames.device)
        with torch.no_grad():
            codes = self.laq.encode(frames)
        is_pad = batch.get(f"{self.camera}_is_pad")
        valid = torch.ones(len(frames), dtype=torch.bool) if is_pad is None else ~is_pad.any(1)
        return codes, valid.to(frames.device)


# Facts that may change between two runs of a policy, if the user says so.
_FORGETTABLE = ("frame_gap", "laq_hash")


def open_label_source(config: HLRPConfig, meta: LeRobotDatasetMetadata | None) -> LabelSource | None:
    """The source that the config names, checked against the config and the dataset; None where it names none.

    What the source fixes (sizes, frame gap, LAQ) is written into the config where it left that open.

    Raises:
        ValueError: it does not fit the config, the checkpoint or the dataset; both sides are named.
    """
    source = _open(config)
    if source is None:
        return None
    for name, value in source.facts.items():
        wanted = getattr(config, name)
        forget = f", or give the old codes up with --policy.{name}=null" if name in _FORGETTABLE else ""
        expect(
            wanted in (None, value),
            name,
            f"{wanted}, as the policy's settings or its checkpoint have it",
            f"{value} from {source.title}",
            f"Use labels that fit{forget}.",
        )
        setattr(config, name, value)
    config.laq_id = source.laq_id or config.laq_id
    if meta is not None:
        _check_frame_gap(source, meta)
        source.check_dataset(meta)
    return source


def _check_frame_gap(source: LabelSource, meta: LeRobotDatasetMetadata) -> None:
    longest, gap = max(meta.episodes["length"]), source.facts["frame_gap"]
    expect(
        gap < longest,
        "frame_gap",
        f"less than {longest}, the length of the dataset's longest episode",
        f"{gap} from {source.title}",
        "Use a LAQ with a smaller frame gap, or a dataset with longer episodes.",
    )


def _open(config: HLRPConfig) -> LabelSource | None:
    if config.codes is not None:
        from hlrp_core.laq.code_table import CodeTable

        return TableLabels(CodeTable.load(config.codes), config.codes)
    if config.laq is not None:
        from hlrp_core.laq.quantizer import LatentActionQuantizer

        assert config.camera is not None  # settled by validate_features
        return OnlineLabels(LatentActionQuantizer.from_pretrained(config.laq), config.laq, config.camera)
    return None


def resolve_frame_gap(config: HLRPConfig) -> int:
    """The frame gap of an online LAQ, from its settings alone: LeRobot asks before the policy is built."""
    assert config.laq is not None
    if config.frame_gap is not None:
        return config.frame_gap
    return _read_frame_gap(config.laq)


@lru_cache(maxsize=8)
def _read_frame_gap(laq: str) -> int:
    folder = Path(laq)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(laq, "config.json")).parent
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["frame_gap"]
