"""`open_source`: the source for whatever a person names as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from trimtab.data.folder import Folder, known_ending, open_file
from trimtab.data.hub import from_hub, is_dataset, is_saved, of_object, saved_dataset
from trimtab.data.memory import PythonRows
from trimtab.data.source import Source
from trimtab.errors import DataError, suggest

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


def _may_be_id(text: str) -> bool:
    if not HUB_ID.fullmatch(text) or known_ending(Path(text)):
        return False
    return not Path(text).parent.exists()


def _near(path: Path) -> str:
    """Names in the folder where the file should be that are like its own."""
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r} either."
    return suggest(path.name, sorted(entry.name for entry in folder.iterdir()))
