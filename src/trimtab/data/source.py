"""Where rows come from: the contract of every source, and what its files share.

A source is read in its own order, in constant memory but for a few bytes a row, and from any row on.
Its rows are decoded values; `trimtab.data.records` makes records of them.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import IO, cast

from trimtab.errors import DataError

BOM = b"\xef\xbb\xbf"  # opens many UTF-8 files from Windows


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded row.

    ``origin`` is what a person looks it up by: ``file:line``, ``file:row N``. ``fault`` says why there
    is no value. ``index`` is the row's place in the source (from 0); ``part`` counts the rows that a
    map function made of one.
    """

    value: object
    origin: str
    fault: str = ""
    index: int = 0
    part: int = 0


class Source(ABC):
    """A sequence of rows.

    ``name`` is short, ``kind`` are words for a person ("CSV with 2 columns (commas): text, label").
    ``digest`` identifies the content. ``count`` is the number of rows, where it is known before they
    are read. ``notes`` are sentences on what was left out; ``dropped`` counts the rows that a person's
    own functions left out, since the last call of `rows`. ``certain`` tells that ``digest`` is of all the
    content: what is made of an uncertain source is never taken from a cache.
    """

    name: str
    kind: str
    digest: str
    count: int | None
    notes: tuple[str, ...] = ()
    dropped: int = 0
    certain: bool = True

    @abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """The rows from the one with index ``start`` on, in order; the same ones whenever it is called."""

    def after(self, row: Row) -> Iterator[Row]:
        """The rows that follow ``row``, exactly."""
        return self.following(row.index, row.part)

    def following(self, index: int, part: int = 0) -> Iterator[Row]:
        """The rows after the one with that index and part: what a stored cursor resumes with."""
        return dropwhile(lambda row: (row.index, row.part) <= (index, part), self.rows(index))


class FileSource(Source):
    """A source that is one file. ``name`` is that of the file unless another is given."""

    def __init__(self, path: Path | str, name: str = "") -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        with self.reading():
            self._stamp = self._stat()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what goes wrong while the file is read into a `DataError`."""
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.name}: the gzip file is damaged or cut short: {error}."
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot read the data file {str(self.path)!r}: {error.strerror or error}."
            ) from error

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file was written since it was opened: places in it are void then."""
        with self.reading():
            if self._stat() != self._stamp:
                raise DataError(
                    f"{self.name}: the file was changed while it was in use; start anew."
                )

    def _stat(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns


def open_bytes(path: Path) -> IO[bytes]:
    """The content of a file, decompressed if its name ends with ``.gz``."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def check_text(head: bytes, name: str) -> None:
    """Raise `DataError` if a file that begins with ``head`` is no UTF-8 text, and say what it is."""
    for magic, what in (
        (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
        (b"\x1f\x8b", "compressed by gzip; let its name end with .gz"),
        (b"PAR1", "a Parquet file; let its name end with .parquet"),
        (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save it as CSV in UTF-8"),
    ):
        if head.startswith(magic):
            raise DataError(f"{name}: this is {what}.")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
