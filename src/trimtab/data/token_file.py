"""Tokenised examples on disk: written once, in order and in constant memory; read at random through memory maps.

A folder of flat little-endian arrays. For n examples with N token ids in all (an example of m tokens has m + 1
ids: its tokens, and the last one's target):

    ids (N,) int32        weights (N,) float32      ends (n,) int64: where each example's ids end
    trained (n,) int32    keys (n,) uint64          origins: UTF-8 text, with origin_ends (n,) int64
    meta.json             counts, and what the writer wants to remember
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, overload

import numpy as np
from numpy.typing import NDArray

from trimtab.adapt.disk import read_json, write_json
from trimtab.data.datum import Datum
from trimtab.errors import DataError, FileFormatError

SCHEMA = 1
META = "meta.json"
TYPES: dict[str, str] = {
    "ids": "<i4",
    "weights": "<f4",
    "ends": "<i8",
    "trained": "<i4",
    "keys": "<u8",
    "origins": "|u1",
    "origin_ends": "<i8",
}


class TokenWriter:
    """Writes examples into an existing, empty folder. `close` makes it whole; leaving the ``with`` does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._sizes = dict.fromkeys(TYPES, 0)
        self._files: dict[str, BinaryIO] = {
            name: (folder / f"{name}.bin").open("wb") for name in TYPES
        }

    def add(self, datum: Datum, key: int) -> None:
        """Append one example; ``key`` is that of its record, 64 bits. Raises `DataError` if its targets are
        not simply the tokens that follow."""
        if datum.targets[:-1] != datum.tokens[1:]:
            raise DataError(f"{datum.origin}: its targets are not the tokens that follow.")
        self._append("ids", [*datum.tokens, datum.targets[-1]])
        self._append("weights", [0.0, *datum.weights])
        self._append("ends", [self._sizes["ids"]])
        self._append("trained", [sum(1 for weight in datum.weights if weight)])
        self._append("keys", [key])
        self._append("origins", list(datum.origin.encode()))
        self._append("origin_ends", [self._sizes["origins"]])
        self.count += 1

    def _append(self, name: str, values: Sequence[float]) -> None:
        self._files[name].write(np.asarray(values, dtype=TYPES[name]).tobytes())
        self._sizes[name] += len(values)

    def close(self, facts: Mapping[str, Any]) -> None:
        """Flush, and note the counts and ``facts`` (JSON)."""
        for file in self._files.values():
            file.close()
        write_json(
            self.folder / META, {"schema": SCHEMA, "sizes": self._sizes, "facts": dict(facts)}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()


class TokenFile(Sequence[Datum]):
    """The examples in a folder that a `TokenWriter` closed. What is read stays on disk.

    Raises `FileFormatError` for a folder that is not a whole one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_json(folder / META) if (folder / META).is_file() else {}
        if meta.get("schema") != SCHEMA:
            raise FileFormatError(f"{folder} is no folder of tokenised examples; remove it.")
        self.facts: dict[str, Any] = meta["facts"]
        arrays = {name: self._map(name, meta["sizes"][name]) for name in TYPES}
        self._ids, self._weights, self._origins = (arrays[n] for n in ("ids", "weights", "origins"))
        self._ends, self._origin_ends = (np.array(arrays[n]) for n in ("ends", "origin_ends"))
        self.keys: NDArray[np.uint64] = np.array(arrays["keys"])
        self.trained: NDArray[np.int32] = np.array(arrays["trained"])
        self.lengths: NDArray[np.int64] = np.diff(self._ends, prepend=0) - 1

    def _map(self, name: str, size: int) -> NDArray[Any]:
        path, kind = self.folder / f"{name}.bin", np.dtype(TYPES[name])
        if not path.is_file() or path.stat().st_size != size * kind.itemsize:
            raise FileFormatError(f"{path} is torn; remove {self.folder}, and it is made again.")
        if size == 0:
            return np.empty(0, kind)
        return np.memmap(path, dtype=kind, mode="r", shape=(size,))

    def digest(self) -> str:
        """SHA-256 of all the examples."""
        content = hashlib.sha256()
        for name in TYPES:
            with (self.folder / f"{name}.bin").open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Datum: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Datum]: ...
    def __getitem__(self, index: int | slice) -> Datum | Sequence[Datum]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, stop = self._span(self._ends, place)
        ids = self._ids[start:stop].tolist()
        weights = self._weights[start + 1 : stop].tolist()
        first, last = self._span(self._origin_ends, place)
        origin = self._origins[first:last].tobytes().decode()
        return Datum(tuple(ids[:-1]), tuple(ids[1:]), tuple(weights), origin)

    @staticmethod
    def _span(ends: NDArray[np.int64], place: int) -> tuple[int, int]:
        return int(ends[place - 1]) if place else 0, int(ends[place])
