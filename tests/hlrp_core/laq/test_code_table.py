"""Code tables: round trip, look-up, and refusal of what does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from hlrp_core.laq.code_table import CodeTable, CodeTableHeader


def make_table(codebook_size: int = 8) -> CodeTable:
    header = CodeTableHeader("user/data", "f" * 64, "observation.image", 2, 2, 3, codebook_size, "laq", "h" * 64)
    codes = torch.randint(0, codebook_size, (10, 3), generator=torch.Generator().manual_seed(0))
    return CodeTable(codes, torch.arange(10) % 4 != 3, header)


@pytest.mark.parametrize("codebook_size", [8, 100_000])
def test_round_trip(tmp_path, codebook_size):
    table = make_table(codebook_size)
    table.save(tmp_path / "codes.safetensors")
    loaded = CodeTable.load(tmp_path / "codes.safetensors")
    assert loaded.header == table.header
    codes, valid = loaded.lookup(torch.arange(10))
    assert torch.equal(codes, table.codes.long())
    assert torch.equal(valid, table.valid)
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]


def test_it_may_carry_the_laqs_vectors(tmp_path):
    plain = make_table()
    vectors = torch.randn(3, 8, 2)
    for table in (plain, CodeTable(plain.codes, plain.valid, plain.header, vectors)):
        table.save(tmp_path / "codes.safetensors")
        loaded = CodeTable.load(tmp_path / "codes.safetensors")
        assert torch.equal(loaded.vectors, vectors) if table is not plain else loaded.vectors is None
    with pytest.raises(ValueError, match=r"expected vectors \[3, 8, D\], got \(3, 7, 2\)"):
        CodeTable(plain.codes, plain.valid, plain.header, vectors[:, :7])


def test_a_table_of_another_dataset_is_refused_with_both_named():
    table = make_table()
    table.check_dataset(dataset_id="user/moved", fingerprint="f" * 64, num_frames=10)
    with pytest.raises(ValueError, match=r"expected one of the dataset user/other .* got one of user/data"):
        table.check_dataset(dataset_id="user/other", fingerprint="e" * 64, num_frames=10)
    with pytest.raises(ValueError, match="11 frames"):
        table.check_dataset(dataset_id="user/other", fingerprint="f" * 64, num_frames=11)


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_outside_the_table_are_refused(index):
    with pytest.raises(ValueError, match=r"expected frame indices in \[0, 10\)"):
        make_table().lookup(torch.tensor([index]))


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="make it with hlrp-label"):
        CodeTable.load(tmp_path / "none.safetensors")
    save_file({"codes": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a file without its header"):
        CodeTable.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("content", [b"", b"codes", b"these are no codes, but a text of some length"])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "codes.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"code table: expected one of schema 1 in .*, got .*Next step: check the path"
    ):
        CodeTable.load(tmp_path / "codes.safetensors")


def test_a_truncated_table_is_refused(tmp_path):
    path = tmp_path / "codes.safetensors"
    make_table().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"got another or a damaged file .*Next step"):
        CodeTable.load(path)


@pytest.mark.parametrize(
    ("header", "got"),
    [
        ("{", "an unreadable header"),
        ("[1]", "an unreadable header"),
        ("{}", "an unreadable header"),
        ('{"schema_version": 1}', "an unreadable header"),
        ('{"schema_version": 2}', "schema 2"),
        (json.dumps(asdict(make_table().header)), r"another or a damaged file .*codes"),
    ],
)
def test_headers_and_tensors_of_another_kind_are_refused(tmp_path, header, got):
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(2, 3)}, tmp_path / "other.safetensors", metadata={"header": header})
    with pytest.raises(ValueError, match=f"code table: expected one of schema 1 in .*got {got}.*Next step"):
        CodeTable.load(tmp_path / "other.safetensors")
