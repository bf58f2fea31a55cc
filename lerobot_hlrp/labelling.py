"""Labels a LeRobotDataset with a LAQ's codes, a piece of an episode at a time: memory stays flat.

Frames are decoded in a thread of their own while the encoder works, and both are done once for a frame, in however many
tuples it is.

Shape legend: n frames of a piece, T frames of a tuple, Δ the frames between two of them, S codes of a label.
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

    def add(self, codes: Tensor, *, first_row: int) -> None:
        """Take the codes `[m, S]` of consecutive rows."""
        rows = slice(first_row, first_row + len(codes))
        self.codes[rows], self.valid[rows] = codes, True
        self.num_frames = rows.stop

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
