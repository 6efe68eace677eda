"""Tables: CSV with a header, and Parquet. A row is an object whose keys are the columns."""

from __future__ import annotations

import csv
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, final

from trimtab.data.source import BOM, FileSource, Row, check_text, open_bytes, sha256_of
from trimtab.errors import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
WIDEST = 2**31 - 1  # bytes of one field; csv's own limit of 128 KiB is less than some documents
BATCH = 256  # rows of Parquet decoded at a time


@final
class CsvFile(FileSource):
    """A CSV file in UTF-8 whose first record names the columns; every value is text.

    Fields are divided by commas, semicolons or tabs, whichever the header has most of (``.tsv``: tabs);
    ``kind`` says which. Quoted fields may hold line breaks; the origin of a row is the line on which it
    starts. A row with too many or too few fields, broken quotes or bytes that are not UTF-8 has a fault.
    """

    def __init__(self, path: Path | str, name: str = "") -> None:
        super().__init__(path, name)
        csv.field_size_limit(WIDEST)
        self._offsets = array("q")
        self._numbers = array("q")
        content = sha256()
        self._delimiter = "\t" if ".tsv" in self.path.suffixes else ","
        with self.reading(), open_bytes(self.path) as file:
            head = file.readline()
            check_text(head, self.name)
            if ".tsv" not in self.path.suffixes:
                self._delimiter = _delimiter(head.removeprefix(BOM).decode("utf-8", "replace"))
            file.seek(0)
            records = self._records(_Lines(file, content=content))
            self.columns = self._header(next(records, None))
            for offset, number, _, _ in records:
                self._offsets.append(offset)
                self._numbers.append(number)
        if not self._offsets:
            raise DataError(f"{self.name}: the file has a header, and no rows below it.")
        plural = "s" if len(self.columns) > 1 else ""
        self.kind = (
            f"CSV with {len(self.columns)} column{plural} ({DELIMITERS[self._delimiter]}): "
            + ", ".join(self.columns)
        )
        self.digest = content.hexdigest()
        self.count: int = len(self._offsets)

    def rows(self, start: int = 0) -> Iterator[Row]:
        if start >= self.count:
            return
        self.check_unchanged()
        with self.reading(), open_bytes(self.path) as file:
            file.seek(self._offsets[start])
            lines = _Lines(file, self._offsets[start], self._numbers[start] - 1)
            for index, (_, number, cells, fault) in enumerate(self._records(lines), start):
                origin = f"{self.name}:{number}"
                if not fault and len(cells) != len(self.columns):
                    fault = (
                        f"{len(cells)} fields, expected {len(self.columns)} "
                        f"({', '.join(self.columns)}); a field with a delimiter or a line break in "
                        "it must be quoted."
                    )
                if fault:
                    yield Row(None, origin, fault, index)
                else:
                    yield Row(dict(zip(self.columns, cells, strict=True)), origin, "", index)

    def _records(self, lines: _Lines) -> Iterator[tuple[int, int, list[str], str]]:
        """(offset, line, fields, fault) of each record that is not blank."""
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while True:
            offset, number, lines.fault = lines.offset, lines.number + 1, ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield offset, number, [], f"broken CSV: {_explained(str(error))}."
                continue
            blank = not cells or (len(cells) == 1 and not cells[0].strip())
            if lines.fault or not blank:
                yield offset, number, cells, lines.fault

    def _header(self, record: tuple[int, int, list[str], str] | None) -> tuple[str, ...]:
        if record is None:
            raise DataError(f"{self.name}: the file is empty; a CSV file begins with its header.")
        _, number, cells, fault = record
        columns = tuple(cell.strip() for cell in cells)
        if not fault and "" in columns:
            fault = f"column {columns.index('') + 1} of the header has no name."
        twice = [column for column in columns if columns.count(column) > 1]
        if not fault and twice:
            fault = f"the header has the column {twice[0]!r} twice."
        if not fault and len(columns) == 1 and "|" in columns[0]:
            fault = (
                f"the header is one column, {columns[0]!r}; fields must be divided by commas, "
                "semicolons or tabs."
            )
        if fault:
            raise DataError(f"{self.name}:{number}: {fault}")
        return columns


class _Lines(Iterator[str]):
    """The lines of a file as text for `csv.reader`; ``offset`` and ``number`` are those of what was read."""

    def __init__(
        self, file: IO[bytes], offset: int = 0, number: int = 0, content: Any = None
    ) -> None:
        self._file = file
        self._content = content
        self.offset = offset
        self.number = number
        self.fault = ""

    def __next__(self) -> str:
        raw = self._file.readline()
        if not raw:
            raise StopIteration
        if self._content is not None:
            self._content.update(raw)
        first = not self.offset
        self.offset += len(raw)
        self.number += 1
        if first:
            raw = raw.removeprefix(BOM)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = (
                f"not UTF-8 (byte {error.start + 1} of line {self.number}); convert the file."
            )
            return raw.decode("utf-8", "replace")


def _delimiter(header: str) -> str:
    counts = {}
    for delimiter in DELIMITERS:
        try:
            counts[delimiter] = len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            counts[delimiter] = 0
    return max(counts, key=counts.__getitem__)


def _explained(reason: str) -> str:
    if "unexpected end of data" in reason:
        return "a quote is opened here and never closed"
    if "new-line character" in reason:
        return "line breaks of an old kind (a bare carriage return); convert the file"
    return reason


@final
class ParquetFile(FileSource):
    """A Parquet file. A null is an absent key, except in the row itself, where it is None."""

    def __init__(self, path: Path | str, name: str = "") -> None:
        super().__init__(path, name)
        with self.reading():
            self.digest = sha256_of(self.path)
        with self._opened() as file:
            self._groups = [
                file.metadata.row_group(number).num_rows
                for number in range(file.metadata.num_row_groups)
            ]
            columns = list(file.schema_arrow.names)
        self._starts = [0, *accumulate(self._groups)]
        self.count: int = self._starts[-1]
        if not self.count:
            raise DataError(f"{self.name}: the Parquet file has no rows.")
        plural = "s" if len(columns) > 1 else ""
        self.kind = f"Parquet with {len(columns)} column{plural}: {', '.join(columns)}"

    def rows(self, start: int = 0) -> Iterator[Row]:
        if start >= self.count:
            return
        self.check_unchanged()
        group = bisect_right(self._starts, start) - 1
        index = self._starts[group]
        with self._opened() as file:
            groups = list(range(group, len(self._groups)))
            for batch in file.iter_batches(batch_size=BATCH, row_groups=groups):
                if index + batch.num_rows > start:
                    skipped = max(0, start - index)
                    rows = batch.slice(skipped).to_pylist()
                    yield from table_rows(rows, self.name, index + skipped)
                index += batch.num_rows

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        with self.reading():
            try:
                with parquet.ParquetFile(self.path) as file:
                    yield file
            except pyarrow.ArrowException as error:
                raise DataError(
                    f"{self.name}: this Parquet file cannot be read: {error}"
                ) from error


def table_rows(values: list[dict[str, Any]], name: str, index: int) -> Iterator[Row]:
    """The rows of a decoded table; their origin counts from 1."""
    for place, value in enumerate(values, start=index):
        row = {key: without_nulls(cell) for key, cell in value.items()}
        yield Row(row, f"{name}:row {place + 1}", "", place)


def without_nulls(value: Any) -> Any:
    """``value`` without keys that are null: a column of objects gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value
