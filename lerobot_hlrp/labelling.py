"""Labels a LeRobotDataset with a LAQ's codes, a piece of an episode at a time: memory stays flat.

Frames are decoded in a thread of their own while the encoder works, and both are done once for a frame, in however many
tuples it is.

Shape legend: n frames of a piece, T frames of a tuple, Δ the frames between two of them, S codes of a label.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hlrp_core.laq.code_table import CodeTable, CodeTableHeader
from hlrp_core.laq.pairs import tuple_starts
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.run_folder import StopRequest
from lerobot_hlrp.fingerprint import dataset_fingerprint
from lerobot_hlrp.frame_reader import EpisodeFrames

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset

logger = logging.getLogger(__name__)


class PartialTable:
    """The codes of a labelling run so far, on disk beside the output; a rerun continues with them.

    One file holds them, what they are of and how far they go: a kill never leaves the codes of one run as another's.

    Args:
        output: the table to be; the partial file has its name with a suffix.
        identity: what must be equal to continue.
        shape: `(N, S)`.
    """

    def __init__(self, output: Path, identity: str, shape: tuple[int, int]):
        self.path = output.with_name(f".{output.name}.partial")
        self.scratch = self.path.with_name(f"{self.path.name}.tmp")
        self.identity = identity
        self.codes = torch.zeros(shape, dtype=torch.int32)
        self.valid = torch.zeros(shape[0], dtype=torch.bool)
        self.num_frames = 0  # the first so many are done
        if self.path.is_file():
            self._continue()

    def _continue(self) -> None:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") == self.identity:
                    self.codes, self.valid = file.get_tensor("codes"), file.get_tensor("valid")
                    self.num_frames = int(metadata["frames"])
        except (SafetensorError, OSError) as error:  # OSError: an empty file cannot be mapped
            logger.warning("Labelling begins anew: %s is damaged (%s)", self.path, error)

    def add(self, codes: Tensor, *, first_row: int) -> None:
        """Take the codes `[m, S]` of consecutive rows."""
        rows = slice(first_row, first_row + len(codes))
        self.codes[rows], self.valid[rows] = codes, True
        self.num_frames = rows.stop

    def save(self) -> None:
        """Write the file under a temporary name, then rename it."""
        metadata = {"identity": self.identity, "frames": str(self.num_frames)}
        save_file({"codes": self.codes, "valid": self.valid}, self.scratch, metadata=metadata)
        self.scratch.replace(self.path)

    def delete(self) -> None:
        for path in (self.path, self.scratch):
            path.unlink(missing_ok=True)


def label_dataset(
    laq: LatentActionQuantizer,
    dataset: LeRobotDataset,
    *,
    camera: str,
    laq_id: str,
    output: Path,
    frame_gap: int | None = None,
    batch_size: int = 64,
    save_interval_s: float = 10.0,
) -> CodeTable | None:
    """Label every frame whose tuple fits into its episode, and write the table.

    Args:
        laq_id: name of the LAQ, for the table's header.
        frame_gap: Δ in frames of this dataset; by default the LAQ's.
        save_interval_s: between two saves of the partial table: what a kill can cost.

    Returns:
        the table, or None where the run was interrupted.

    Raises:
        ValueError: no episode is as long as the frame gap.
    """
    meta = dataset.meta
    source = EpisodeFrames(dataset, camera)
    frame_gap = frame_gap or laq.frame_gap
    tuple_starts(source.lengths, frame_gap=frame_gap, num_frames=laq.config.num_frames)  # fails on too large a gap
    fingerprint, laq_hash = dataset_fingerprint(meta), laq.weights_hash()
    # apart, or else `cam1` with a gap of 2 would be `cam` with one of 12
    identity = hashlib.sha256("\n".join([fingerprint, laq_hash, camera, str(frame_gap)]).encode()).hexdigest()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = PartialTable(output, identity, (meta.total_frames, laq.code_seq_len))
    span = frame_gap * (laq.config.num_frames - 1)
    starts = {piece: source.first_rows[piece.episode] + piece.start for piece in source.pieces(overlap=span)}
    pieces = [piece for piece, start in starts.items() if start >= partial.num_frames]
    saved_at = time.monotonic()
    bar = tqdm(total=meta.total_frames, initial=partial.num_frames, unit="frame", desc="Labelling")
    with StopRequest() as stop, bar:
        for piece, frames in zip(pieces, source.read_ahead(pieces), strict=True):
            codes = encode_frames(laq, frames, frame_gap=frame_gap, batch_size=batch_size)
            partial.add(codes, first_row=starts[piece])
            bar.update(partial.num_frames - bar.n)
            if stop.requested or time.monotonic() - saved_at >= save_interval_s:
                partial.save()
                saved_at = time.monotonic()
            if stop.requested and piece is not pieces[-1]:
                bar.close()
                print(f"Stopped after {partial.num_frames} frames. Run the same command again to continue.")
                return None
        bar.update(meta.total_frames - bar.n)  # the last frames of an episode have no tuple
    header = CodeTableHeader(
        dataset_id=dataset.repo_id,
        dataset_fingerprint=fingerprint,
        camera=camera,
        frame_gap=frame_gap,
        num_frames=laq.config.num_frames,
        code_seq_len=laq.code_seq_len,
        codebook_size=laq.codebook_size,
        laq_id=laq_id,
        laq_hash=laq_hash,
    )
    table = CodeTable(partial.codes, partial.valid, header, laq.code_vector_table())
    table.save(output)
    partial.delete()
    return table


def encode_frames(laq: LatentActionQuantizer, frames: np.ndarray, *, frame_gap: int, batch_size: int = 64) -> Tensor:
    """Codes `[n - Δ * (T-1), S]` int32 of all tuples of consecutive frames `[n, H, W, 3]` uint8, on the CPU.

    What the LAQ makes of one frame is made once, for all tuples that the frame is in.
    """
    device = next(laq.parameters()).device
    images = torch.from_numpy(frames)
    embedded = torch.cat([laq.embed(batch.to(device)[None])[0] for batch in images.split(batch_size)])  # (n, 2E, h, h)
    span = frame_gap * (laq.config.num_frames - 1)
    tuples = embedded.unfold(0, span + 1, 1)[..., ::frame_gap].movedim(-1, 1)  # (n - span, T, 2E, h, h), a view
    return laq.encode_embedded(tuples, batch_size=batch_size).int().cpu()
