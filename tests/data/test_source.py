"""Sources: rows, numbers, digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from trimtab.data import JsonlFile, Row
from trimtab.errors import DataError


def test_lines_have_their_numbers_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\r\n\n  \n{"b": 1}')
    file = JsonlFile(path)
    assert list(file) == [
        Row({"a": "\u2028"}, "a.jsonl:1", "", 0),
        Row({"b": 1}, "a.jsonl:4", "", 1),
    ]
    assert file[-1] == file[1:][0]
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_file_and_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*No such file"):
        JsonlFile(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        JsonlFile(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: the file has no records"):
        JsonlFile(empty)
