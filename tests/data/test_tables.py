"""Tables written by others are read back, from any row on; a bad row says what is wrong with it."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trimtab.data import (
    ChatRecord,
    CsvFile,
    LabelledRecord,
    ParquetFile,
    Row,
    Source,
    open_source,
    parse_row,
)
from trimtab.errors import DataError

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def resumes(source: Source) -> list[Row]:
    """All rows, and a check that each tail is the same."""
    rows = list(source.rows())
    assert [row.index for row in rows] == list(range(len(rows)))
    for start in range(len(rows) + 2):
        assert list(source.rows(start)) == rows[start:]
    for row in rows:
        assert list(source.after(row)) == rows[row.index + 1 :]
    assert source.count == len(rows)
    return rows


@FILES
@given(
    st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_csv_round_trip(
    tmp_path: Path, cells, delimiter: str, quoting, end: str, bom: bool, packed: bool
) -> None:
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    cells = [pair for pair in cells if pair[0].strip() or pair[1].strip()] or [("x", "y")]
    plain = tmp_path / "plain.csv"
    with plain.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
        writer.writerow(["text", "label"])
        writer.writerows(cells)
    path.write_bytes(gzip.compress(plain.read_bytes()) if packed else plain.read_bytes())
    rows = resumes(CsvFile(path))
    assert [(row.value["text"], row.value["label"]) for row in rows] == cells


@FILES
@given(
    st.lists(st.tuples(CELL, st.none() | st.integers(-5, 5)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_parquet_round_trip(tmp_path: Path, cells, group: int) -> None:
    values = [{"text": text, "label": label} for text, label in cells]
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(values, pa.schema([("text", pa.string()), ("label", pa.int64())]))
    parquet.write_table(table, path, row_group_size=group)
    rows = resumes(ParquetFile(path))
    assert [row.value for row in rows] == values
    assert [row.origin for row in rows] == [f"a.parquet:row {n}" for n in range(1, len(cells) + 1)]


def test_rows_say_where_they_start(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\ntwo",yes\n\n  \nthree,no\n', encoding="utf-8")
    source = open_source(path)
    assert source.kind == "CSV with 2 columns (commas): text, label"
    rows = resumes(source)
    assert [row.origin for row in rows] == ["a.csv:2", "a.csv:6"]
    assert parse_row(rows[0]) == LabelledRecord("one\ntwo", "yes", origin="a.csv:2")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "a;b\n1;2\n", "semicolons"),
        ("a.csv", "a\tb\n1\t2\n", "tabs"),
        ("a.tsv", "a, b\tc\n1, 2\t3\n", "tabs"),
        ("a.csv", '"a;b",c\n1,2\n', "commas"),
    ],
)
def test_the_delimiter_is_said(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    source = open_source(tmp_path / name)
    assert f"CSV with 2 columns ({words})" in source.kind
    assert len(next(source.rows()).value) == 2  # type: ignore[arg-type]


BAD_ROWS = {
    "a short row": (b"only one\n", "1 fields, expected 2 (text, label)"),
    "a long row": (b"a,b,c\n", "3 fields, expected 2"),
    "half a character": (b"caf\xc3,x\n", "not UTF-8 (byte 4 of line 3)"),
    "latin-1": (b"caf\xe9,x\n", "not UTF-8"),
    "text after a quote": (b'"a"b,c\n', "broken CSV"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_a_fault_of_its_own(tmp_path: Path, name: str) -> None:
    raw, reason = BAD_ROWS[name]
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\ngood,1\n" + raw + b"fine,2\n")
    rows = resumes(open_source(path))
    assert [bool(row.fault) for row in rows] == [False, True, False]
    assert reason in rows[1].fault
    with pytest.raises(DataError, match=r"^a\.csv:3: "):
        parse_row(rows[1])
    assert rows[2].value == {"text": "fine", "label": "2"}


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,1\n"b,2\nc,3\n')
    rows = resumes(open_source(path))
    assert [row.fault for row in rows] == [
        "",
        "broken CSV: a quote is opened here and never closed.",
    ]
    assert rows[1].origin == "a.csv:3"


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.csv", b"", "the file is empty; a CSV file begins with its header"),
    "header alone": ("a.csv", b"text,label\n", "a header, and no rows below it"),
    "a column twice": ("a.csv", b"text,text\na,b\n", "the column 'text' twice"),
    "a column without a name": ("a.csv", b"text,\na,b\n", "column 2 of the header has no name"),
    "another delimiter": (
        "a.csv",
        b"text|label\na|b\n",
        "must be divided by commas, semicolons or",
    ),
    "a list by another name": (
        "a.jsonl",
        b'[\n{"text": "a"}\n]',
        "this is a JSON list, and a JSONL",
    ),
    "JSONL in UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text; save it as"),
    "UTF-16": ("a.csv", "text,label\na,b\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04...", "a spreadsheet"),
    "gzip by another name": ("a.csv", gzip.compress(b"a,b\n"), "compressed by gzip; let its name"),
    "no gzip": ("a.csv.gz", b"text,label\na,b\n", "the gzip file is damaged or cut short"),
    "half a gzip": ("a.csv.gz", gzip.compress(b"a,b\n" * 99)[:-9], "damaged or cut short"),
    "no Parquet": ("a.parquet", b"text,label\na,b\n", "this Parquet file cannot be read"),
    "half a Parquet": ("a.parquet", b"PAR1....", "this Parquet file cannot be read"),
    "no bytes of Parquet": ("a.parquet", b"", "this Parquet file cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_says_what_it_is(tmp_path: Path, name: str) -> None:
    file, raw, reason = BAD_FILES[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(DataError, match=reason) as caught:
        open_source(tmp_path / file)
    assert file in str(caught.value)


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: the Parquet file has no rows"):
        open_source(tmp_path / "a.parquet")


def test_nulls_of_a_table_are_absent_keys(tmp_path: Path) -> None:
    # Parquet gives each object the keys of all.
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
    rows = [{"messages": turns, "tools": None}, {"messages": turns, "tools": "[]"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    record = parse_row(next(open_source(tmp_path / "a.parquet").rows()))
    assert isinstance(record, ChatRecord)
    assert [message.weight for message in record.messages] == [1.0, 0.5]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,lable\ngood,1\n")
    with pytest.raises(DataError, match=r"a.csv:2: unknown shape .* sentence, lable.*'columns'"):
        parse_row(next(open_source(tmp_path / "a.csv").rows()))


def test_long_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n")
    row = next(open_source(tmp_path / "a.csv").rows())
    assert row.value == {"text": "x" * 300_000}


def test_a_file_that_changes_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\na\nb\n")
    source = open_source(path)
    path.write_text("text\nlonger\nb\n")
    with pytest.raises(DataError, match="a.csv: the file was changed while it was in use"):
        list(source.rows(1))


def test_digests_are_those_of_the_content(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text\na\n")
    (tmp_path / "c.csv").write_text("text\nb\n")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"text\na\n"))
    digests = [open_source(tmp_path / f"{name}.csv").digest for name in "abc"]
    digests.append(open_source(tmp_path / "d.csv.gz").digest)
    assert [digests.index(digest) for digest in digests] == [0, 0, 2, 0]
