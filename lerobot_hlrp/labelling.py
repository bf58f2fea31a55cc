"""Labels a LeRobotDataset with a LAQ's codes, a piece of an episode at a time: memory stays flat.

Frames are decoded in a thread of their own while the encoder works, and those that two tuples share only once; tuples
are encoded in full batches, however short episodes are.

Shape legend: n frames of a piece, B batch, T frames of a tuple, R the LAQ's image side, S codes of a label.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from hlrp_core.laq.code_table import CodeTable, CodeTableHeader
from hlrp_core.laq.pairs import tuple_starts
from hlrp_core.laq.quantizer import LatentActionQuantizer
from hlrp_core.run_folder import StopRequest, read_json, write_json
from lerobot_hlrp.fingerprint import dataset_fingerprint
from lerobot_hlrp.frame_reader import EpisodeFrames

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset


class PartialTable:
    """The codes of a labelling run so far, on disk beside the output; a rerun continues with them.

    Args:
        output: the table to be; the partial files have its name with a suffix.
        identity: what must be equal to continue.
        shape: `(N, S)`.
    """

    def __init__(self, output: Path, identity: str, shape: tuple[int, int]):
        self.tensors_path = output.with_name(f".{output.name}.partial")
        self.progress_path = output.with_name(f".{output.name}.partial.json")
        self.identity = identity
        self.codes = torch.zeros(shape, dtype=torch.int32)
        self.valid = torch.zeros(shape[0], dtype=torch.bool)
        self.num_frames = 0  # the first so many are done
        if self.progress_path.is_file() and read_json(self.progress_path)["identity"] == identity:
            tensors = load_file(self.tensors_path)
            self.codes, self.valid = tensors["codes"], tensors["valid"]
            self.num_frames = read_json(self.progress_path)["frames"]

    def save(self) -> None:
        scratch = self.tensors_path.with_name(f"{self.tensors_path.name}.tmp")
        save_file({"codes": self.codes, "valid": self.valid}, scratch)
        # The tensors first: a kill in between repeats some frames, with equal codes.
        scratch.replace(self.tensors_path)
        write_json(self.progress_path, {"identity": self.identity, "frames": self.num_frames})

    def delete(self) -> None:
        for path in (self.tensors_path, self.progress_path):
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
    identity = hashlib.sha256(f"{fingerprint}{laq_hash}{camera}{frame_gap}".encode()).hexdigest()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = PartialTable(output, identity, (meta.total_frames, laq.code_seq_len))
    span = frame_gap * (laq.config.num_frames - 1)
    starts = {piece: source.first_rows[piece.episode] + piece.start for piece in source.pieces(overlap=span)}
    pieces = [piece for piece, start in starts.items() if start >= partial.num_frames]
    encoder = BatchedEncoder(laq, partial, frame_gap=frame_gap, batch_size=batch_size)
    saved_at = time.monotonic()
    bar = tqdm(total=meta.total_frames, initial=partial.num_frames, unit="frame", desc="Labelling")
    with StopRequest() as stop, bar:
        for piece, frames in zip(pieces, source.read_ahead(pieces), strict=True):
            encoder.add(frames, first_row=starts[piece])
            partial.num_frames = starts[piece] + len(frames) - span
            bar.update(partial.num_frames - bar.n)
            if stop.requested or time.monotonic() - saved_at >= save_interval_s:
                encoder.flush()
                partial.save()
                saved_at = time.monotonic()
            if stop.requested and piece is not pieces[-1]:
                bar.close()
                print(f"Stopped after {partial.num_frames} frames. Run the same command again to continue.")
                return None
        encoder.flush()
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


class BatchedEncoder:
    """Gathers tuples over episodes, which may be short, and encodes them in full batches.

    Args:
        table: receives the codes.
        frame_gap: Δ in frames.
        batch_size: tuples at once.
    """

    def __init__(self, laq: LatentActionQuantizer, table: PartialTable, *, frame_gap: int, batch_size: int):
        self.laq = laq
        self.table = table
        self.frame_gap = frame_gap
        self.batch_size = batch_size
        self._tuples: list[Tensor] = []  # each [m, T, 3, R, R]
        self._rows: list[Tensor] = []
        self._device = next(laq.parameters()).device

    def add(self, frames: np.ndarray, *, first_row: int) -> None:
        """Take the tuples of consecutive frames `[n, H, W, 3]`, of which the first has this row in the table."""
        gap, num_frames = self.frame_gap, self.laq.config.num_frames
        span = gap * (num_frames - 1)
        num_tuples = max(len(frames) - span, 0)
        for start in range(0, num_tuples, self.batch_size):
            stop = min(start + self.batch_size, num_tuples)
            images = self._prepare(frames[start : stop + span])
            offsets = torch.arange(stop - start)[:, None] + gap * torch.arange(num_frames)  # (m, T)
            self._tuples.append(images[offsets.to(self._device)])
            self._rows.append(first_row + torch.arange(start, stop))
            if sum(map(len, self._rows)) >= self.batch_size:
                self.flush()

    def _prepare(self, frames: np.ndarray) -> Tensor:
        """`[n, H, W, 3]` uint8 -> `[n, 3, R, R]` on the LAQ's device, each frame once."""
        return self.laq.prepare(torch.from_numpy(frames).to(self._device)[None])[0]

    def flush(self) -> None:
        """Encode what has been gathered."""
        if not self._rows:
            return
        rows = torch.cat(self._rows)
        self.table.codes[rows] = self.laq.encode_prepared(torch.cat(self._tuples)).cpu().int()
        self.table.valid[rows] = True
        self._tuples, self._rows = [], []
