"""One file, by the ending of its name, and a folder of files as one source."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import final

from trimtab.data.hub import choose_split
from trimtab.data.jsonl import JsonlFile, open_json
from trimtab.data.source import Row, Source
from trimtab.data.tables import CsvFile, ParquetFile
from trimtab.data.text import TextFile
from trimtab.errors import DataError

KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
PACKED = tuple(f"{ending}.gz" for ending in (".jsonl", ".ndjson", ".csv", ".tsv"))
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
# What lies beside the data of many data sets and is none.
BESIDE = ("readme", "license", "licence", "changelog", "dataset_info", "dataset_infos")


def open_file(path: Path, name: str = "") -> Source:
    """The source of one file, by the ending of its name."""
    ending = known_ending(path)
    if ending.startswith((".jsonl", ".ndjson")):
        return JsonlFile(path, name)
    if ending.startswith((".csv", ".tsv")):
        return CsvFile(path, name)
    if ending == ".json":
        return open_json(path, name)
    if ending == ".parquet":
        return ParquetFile(path, name)
    if ending in (".txt", ".md"):
        return TextFile(path, name)
    found = f"the ending {path.suffix!r}" if path.suffix else "no ending"
    raise DataError(
        f"{name or path.name}: a name with {found} does not tell what the file holds. "
        f"Known: {', '.join((*KNOWN, *PACKED))}."
    )


@final
class Folder(Source):
    """All known files in a folder and the folders below it, sorted by name; hidden ones are skipped, and
    what describes data (a README, a licence).

    With ``split``, those whose name, or a folder above them, says train, validation or test. Files of
    several splits and no ``split`` are an error; files of an unknown kind are counted in ``notes``.
    """

    def __init__(self, path: Path | str, split: str | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        files = sorted(
            file.relative_to(self.path)
            for file in self.path.rglob("*")
            if file.is_file() and not _hidden(file.relative_to(self.path))
        )
        known = [file for file in files if known_ending(file) and not _beside(file)]
        if not known:
            found = f" ({len(files)} of another kind)" if files else ""
            raise DataError(
                f"{str(path)!r} holds no data file{found}. Known: {', '.join((*KNOWN, *PACKED))}."
            )
        chosen = self._of_split(known, split)
        self._parts = [open_file(self.path / file, file.as_posix()) for file in chosen]
        counts = [part.count for part in self._parts]
        self._starts = [0, *accumulate(count for count in counts if count is not None)]
        self.count: int = self._starts[-1]
        kinds = Counter(part.kind.partition(":")[0] for part in self._parts)
        self.kind = f"folder of {_files(len(chosen))}: " + ", ".join(
            f"{count} {kind}" for kind, count in kinds.items()
        )
        content = hashlib.sha256()
        for part in self._parts:
            content.update(f"{part.name}\0{part.digest}\0".encode())
        self.digest = content.hexdigest()
        self.notes = tuple(self._left_out(files, known, chosen))

    def rows(self, start: int = 0) -> Iterator[Row]:
        first = bisect_right(self._starts, start) - 1
        for part, base in list(zip(self._parts, self._starts, strict=False))[first:]:
            for row in part.rows(max(0, start - base)):
                yield replace(row, index=base + row.index)

    def _of_split(self, files: list[Path], split: str | None) -> list[Path]:
        of = {file: _split_of(file) for file in files}
        names = list(dict.fromkeys(name for name in of.values() if name))
        if split is None and len(names) < 2:
            return files
        if not names:
            raise DataError(
                f"split={split!r}: no file in {self.name} is named train, validation or test."
            )
        wanted = choose_split(names, SPLITS.get(split, split) if split else None, self.name)
        return [file for file in files if of[file] == wanted]

    def _left_out(self, files: list[Path], known: list[Path], chosen: list[Path]) -> Iterator[str]:
        beside = [file.name for file in files if _beside(file)]
        if beside:
            yield f"{self.name}: {', '.join(beside)} left out."
        strange = Counter(
            file.suffix or "no ending"
            for file in files
            if not known_ending(file) and not _beside(file)
        )
        if strange:
            endings = ", ".join(f"{count} with {ending}" for ending, count in strange.items())
            yield f"{self.name}: {_files(strange.total())} of an unknown kind left out ({endings})."
        unsplit = [file for file in known if file not in set(chosen) and _split_of(file) is None]
        if unsplit:
            yield f"{self.name}: {_files(len(unsplit))} of no split left out."


def known_ending(path: Path) -> str:
    """The known ending of a file's name, or nothing."""
    name = path.name.lower()
    return next((ending for ending in (*KNOWN, *PACKED) if name.endswith(ending)), "")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _beside(path: Path) -> bool:
    return path.name.partition(".")[0].lower() in BESIDE


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str | None:
    for part in (*path.parts[:-1], path.name):
        word = re.split(r"[-_.]", part.lower())[0]
        if word in SPLITS:
            return SPLITS[word]
    return None
