"""Many files as one source, documents as files, and `open_source`, which finds the source for anything."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, final

from trimtab.data.hub import (
    choose_split,
    from_hub,
    is_dataset,
    is_saved,
    of_object,
    saved_dataset,
)
from trimtab.data.jsonl import JsonlFile, open_json
from trimtab.data.source import FileSource, Row, Source, check_text, sha256_of
from trimtab.data.tables import CsvFile, ParquetFile
from trimtab.errors import DataError, suggest

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
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def open_source(
    what: object, *, split: str | None = None, config: str | None = None, stream: bool = False
) -> Source:
    """The source for a path, an id on the hub, an object of `datasets`, or rows made in Python.

    Args:
        what: A file (``.jsonl .ndjson .json .csv .tsv .parquet .txt .md``, and JSONL or CSV with
            ``.gz``), a folder of them, a folder of `datasets.save_to_disk`, ``owner/name`` of the hub,
            a `Dataset` or `IterableDataset`, or dicts in a list or any iterable.
        split: Which of the splits of a folder or a data set.
        config: Which configuration of a data set of the hub.
        stream: Read a data set of the hub as it is downloaded. Files are always read so.

    Raises:
        DataError: no such source, or it holds nothing.
    """
    if isinstance(what, str | Path):
        path = Path(what).expanduser()
        if not path.exists():
            if isinstance(what, str) and _may_be_id(what):
                return from_hub(what, split=split, config=config, stream=stream)
            raise DataError(f"there is no file or folder {str(what)!r}.{_near(path)}")
        if config is not None:
            raise DataError(f"config={config!r} is for data sets of the hub, and {what} is a path.")
        if path.is_dir():
            if is_saved(path):
                return saved_dataset(path, split=split)
            return Folder(path, split)
        if split is not None:
            raise DataError(f"split={split!r} was given, and {path.name} is one file.")
        return open_file(path)
    if is_dataset(what):
        return of_object(what, split=split)
    if split is not None or config is not None:
        raise DataError("split and config are for data sets and folders.")
    if isinstance(what, Source):
        return what
    if isinstance(what, Iterable) and not isinstance(what, Mapping | bytes):
        return PythonRows(what)
    raise DataError(
        f"cannot read data from an object of type {type(what).__name__}; give a path, an id of the "
        "hub, a data set, or a list of dicts."
    )


def open_file(path: Path, name: str = "") -> Source:
    """The source of one file, by the ending of its name."""
    ending = _ending(path)
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
class TextFile(FileSource):
    """A text file as one document."""

    kind = "text, one document"
    count = 1

    def __init__(self, path: Path | str, name: str = "") -> None:
        super().__init__(path, name)
        with self.reading(), self.path.open("rb") as file:
            check_text(file.read(4), self.name)
            self.digest = sha256_of(self.path)

    def rows(self, start: int = 0) -> Iterator[Row]:
        if start:
            return
        self.check_unchanged()
        with self.reading():
            raw = self.path.read_bytes()
        origin = f"{self.name}:1"
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            fault = f"not UTF-8 (byte {error.start + 1}); convert the file."
            yield Row(None, f"{self.name}:{line}", fault)
            return
        yield Row({"text": text}, origin)


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
        known = [file for file in files if _ending(file) and not _beside(file)]
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
            file.suffix or "no ending" for file in files if not _ending(file) and not _beside(file)
        )
        if strange:
            endings = ", ".join(f"{count} with {ending}" for ending, count in strange.items())
            yield f"{self.name}: {_files(strange.total())} of an unknown kind left out ({endings})."
        unsplit = [file for file in known if file not in set(chosen) and _split_of(file) is None]
        if unsplit:
            yield f"{self.name}: {_files(len(unsplit))} of no split left out."


@final
class PythonRows(Source):
    """Rows made in Python, held in memory. ``digest`` is that of them as JSON."""

    def __init__(self, values: Iterable[Any], name: str = "rows") -> None:
        self.name = name
        self._values = list(values)
        self.count: int = len(self._values)
        if not self._values:
            raise DataError("the list of rows is empty.")
        self.kind = "rows in memory"
        content = hashlib.sha256()
        for value in self._values:
            content.update(
                json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "replace")
            )
            content.update(b"\n")
        self.digest = content.hexdigest()

    def rows(self, start: int = 0) -> Iterator[Row]:
        for index in range(start, self.count):
            yield Row(self._values[index], f"{self.name}:{index + 1}", "", index)


def _ending(path: Path) -> str:
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


def _may_be_id(text: str) -> bool:
    if not HUB_ID.fullmatch(text) or _ending(Path(text)):
        return False
    return not Path(text).parent.exists()


def _near(path: Path) -> str:
    """Names in the folder where the file should be that are like its own."""
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r} either."
    return suggest(path.name, sorted(entry.name for entry in folder.iterdir()))
