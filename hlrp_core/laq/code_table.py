"""A code table: the codes of every frame of one dataset, in one safetensors file.

    codes [N, S] int16/int32, valid [N] bool     by global frame index
    vectors [S, K, D] float32                    the LAQ's own vector of each code at each position; not in old tables
    header: JSON with the dataset's id and fingerprint, Δ, T, S, K, and the LAQ's id and hash

A frame whose pair would cross the end of its episode is not valid and never supervises.

Shape legend: N frames of the dataset, B lookups, S codes of a label, K codebook size, D width of a code vector.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class CodeTableHeader:
    """Where a table comes from.

    Args:
        dataset_id: name of the dataset, for people.
        dataset_fingerprint: of its contents; decides whether a table fits.
        camera: whose frames the LAQ saw.
        frame_gap: Δ in frames.
        num_frames: T.
        code_seq_len: codes of a label, (T-1)*S of the LAQ.
        codebook_size: K.
        laq_id, laq_hash: which LAQ.
    """

    dataset_id: str
    dataset_fingerprint: str
    camera: str
    frame_gap: int
    num_frames: int
    code_seq_len: int
    codebook_size: int
    laq_id: str
    laq_hash: str
    schema_version: int = SCHEMA_VERSION


class CodeTable:
    """Codes by global frame index.

    Args:
        codes: `[N, S]` integers; anything where `valid` is False.
        valid: `[N]` bool.
        header: where they come from.
        vectors: `[S, K, D]`, the LAQ's `code_vector_table()`; None in a table that says nothing of them.
    """

    def __init__(self, codes: Tensor, valid: Tensor, header: CodeTableHeader, vectors: Tensor | None = None):
        if codes.ndim != 2 or codes.shape[1] != header.code_seq_len or valid.shape != codes.shape[:1]:
            raise ValueError(
                f"code table: expected codes [N, {header.code_seq_len}] and valid [N], got {tuple(codes.shape)} and "
                f"{tuple(valid.shape)}. Next step: label the dataset anew with hlrp-label."
            )
        if vectors is not None and vectors.shape[:-1] != (header.code_seq_len, header.codebook_size):
            raise ValueError(
                f"code table: expected vectors [{header.code_seq_len}, {header.codebook_size}, D], got "
                f"{tuple(vectors.shape)}. Next step: take those of the LAQ that made the codes."
            )
        self.codes = codes
        self.valid = valid
        self.header = header
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def codebook_size(self) -> int:
        return self.header.codebook_size

    @property
    def code_seq_len(self) -> int:
        return self.header.code_seq_len

    @property
    def frame_gap(self) -> int:
        return self.header.frame_gap

    @property
    def laq_id(self) -> str:
        return self.header.laq_id

    @property
    def laq_hash(self) -> str:
        return self.header.laq_hash

    def provide_codes(self, *, index: Tensor | None = None, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `CodeProvider`; the table goes by `index`."""
        if index is None:
            raise ValueError(
                "code table: expected the global index [B] of each frame t to look it up by, got None. "
                "Next step: pass index=; a LAQ is what goes by the frames."
            )
        return self.lookup(index)

    def lookup(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, S]` long and valid `[B]` bool of global frame indices `[B]`.

        Raises:
            ValueError: an index outside the table.
        """
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(self)):
            raise ValueError(
                f"code table: expected frame indices in [0, {len(self)}), got {int(indices.min())} to "
                f"{int(indices.max())}. Next step: label this dataset with hlrp-label."
            )
        return self.codes[indices].long(), self.valid[indices]

    def check_dataset(self, *, dataset_id: str, fingerprint: str, num_frames: int) -> None:
        """Raises:
        ValueError: the table is of another dataset; both are named.
        """
        header = self.header
        if len(self) != num_frames or header.dataset_fingerprint != fingerprint:
            raise ValueError(
                f"code table: expected one of the dataset {dataset_id} ({num_frames} frames, fingerprint "
                f"{fingerprint[:12]}), got one of {header.dataset_id} ({len(self)} frames, fingerprint "
                f"{header.dataset_fingerprint[:12]}). Next step: label this dataset with hlrp-label."
            )

    def save(self, path: str | Path) -> None:
        """Write the file under a temporary name, then rename it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        dtype = torch.int16 if self.codebook_size <= 2**15 else torch.int32
        tensors = {"codes": self.codes.to(dtype).contiguous(), "valid": self.valid.contiguous()}
        if self.vectors is not None:
            tensors["vectors"] = self.vectors.cpu().contiguous()
        save_file(tensors, scratch, metadata={"header": json.dumps(asdict(self.header))})
        scratch.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> CodeTable:
        """Raises:
        ValueError: no such file, another kind of file, or another schema.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"code table: expected a file, got {path}, which is none. Next step: make it with hlrp-label."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = _read_header(file.metadata(), path)
                vectors = file.get_tensor("vectors") if "vectors" in file.keys() else None  # noqa: SIM118 - no mapping
                return cls(file.get_tensor("codes"), file.get_tensor("valid"), header, vectors)
        except (SafetensorError, OSError) as error:  # OSError: an empty file cannot be mapped
            raise _not_a_table(path, f"another or a damaged file ({error})") from error


def _read_header(metadata: dict[str, str] | None, path: Path) -> CodeTableHeader:
    """Raises:
    ValueError: no header, or one of another schema.
    """
    try:
        header = json.loads((metadata or {}).get("header", "null"))
        if header is None or header["schema_version"] != SCHEMA_VERSION:
            raise _not_a_table(
                path, "a file without its header" if header is None else f"schema {header['schema_version']}"
            )
        return CodeTableHeader(**header)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _not_a_table(path, f"an unreadable header ({error})") from error


def _not_a_table(path: Path, got: str) -> ValueError:
    return ValueError(
        f"code table: expected one of schema {SCHEMA_VERSION} in {path}, got {got}. "
        "Next step: check the path, or label the dataset anew with hlrp-label."
    )
