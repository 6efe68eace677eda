"""Data sets of the `datasets` library: by their id on the hub, saved on disk, or as objects.

`datasets` takes seconds to import, so it is imported when a data set is first asked for.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from trimtab.data.source import Row, Source
from trimtab.data.tables import BATCH, table_rows
from trimtab.errors import DataError, suggest


@final
class DatasetSource(Source):
    """A `datasets.Dataset` or `IterableDataset`. ``digest`` is its fingerprint where none is given; that of
    a stream of unknown origin covers its first rows only, and is not certain."""

    def __init__(self, dataset: Any, name: str = "", digest: str = "") -> None:
        import datasets

        self._streamed = isinstance(dataset, datasets.IterableDataset)
        self._dataset = dataset if self._streamed else dataset.with_format(None)
        info = dataset.info
        self.name = name or info.dataset_name or "dataset"
        split = f", split {dataset.split}" if dataset.split else ""
        columns = f": {', '.join(dataset.column_names)}" if dataset.column_names else ""
        self.kind = f"data set{', streamed' if self._streamed else ''}{split}{columns}"
        self.count = None if self._streamed else len(dataset)
        if self.count == 0:
            raise DataError(f"{self.name}: the data set has no rows.")
        self.certain = bool(digest) or not self._streamed
        self.digest = digest or (self._first_rows() if self._streamed else dataset._fingerprint)

    def rows(self, start: int = 0) -> Iterator[Row]:
        if self.count is not None and start >= self.count:
            return
        index = start
        dataset = self._dataset.skip(start) if start else self._dataset
        try:
            for batch in dataset.iter(batch_size=BATCH):
                size = len(next(iter(batch.values())))
                rows = [{key: batch[key][place] for key in batch} for place in range(size)]
                yield from table_rows(rows, self.name, index)
                index += size
        except Exception as error:  # a stream comes over the network, through four libraries
            raise DataError(
                f"{self.name}: reading stopped at row {index + 1}: {type(error).__name__}: {error}"
            ) from error

    def _first_rows(self) -> str:
        """What identifies a stream of unknown origin: its first rows."""
        content = hashlib.sha256()
        for row, _ in zip(self.rows(), range(64), strict=False):
            content.update(json.dumps(row.value, default=repr).encode())
        return content.hexdigest()


def is_dataset(what: object) -> bool:
    """Whether ``what`` is an object of `datasets`; does not import it."""
    module = sys.modules.get("datasets")
    if module is None:
        return False
    kinds = (
        module.Dataset,
        module.IterableDataset,
        module.DatasetDict,
        module.IterableDatasetDict,
    )
    return isinstance(what, kinds)


def of_object(dataset: Any, *, split: str | None = None, name: str = "") -> DatasetSource:
    """The source of an object of `datasets`; of a dictionary of splits, the one that is asked for."""
    if isinstance(dataset, Mapping):
        chosen = choose_split(list(dataset), split, name or "the data set")
        return DatasetSource(dataset[chosen], name)
    if split is not None:
        raise DataError(f"split={split!r} was given, and this data set is one split already.")
    return DatasetSource(dataset, name)


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote ``folder``."""
    if (folder / "dataset_dict.json").exists():
        return True
    return (folder / "dataset_info.json").exists() and (folder / "state.json").exists()


def saved_dataset(folder: Path, *, split: str | None = None) -> DatasetSource:
    """The source of a folder that `datasets.save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        dataset: Any = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder.name}: this saved data set cannot be read: {error}") from error
    return of_object(dataset, split=split, name=folder.name)


def from_hub(
    name: str, *, split: str | None = None, config: str | None = None, stream: bool = False
) -> DatasetSource:
    """The source of a data set of the hub, ``owner/name``. Whatever goes wrong is a `DataError`."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
        known = list(builder.info.splits or ()) or datasets.get_dataset_split_names(name, config)
        chosen = choose_split(known, split and split.split("[")[0], name)
        chosen = split or chosen  # with a slice, train[:100], which datasets knows
        dataset = datasets.load_dataset(name, config, split=chosen, streaming=stream)
    except DataError:
        raise
    except Exception as error:  # a dozen kinds of them, of four libraries
        raise DataError(
            f"there is no file or folder {name!r} here, and the data set {name!r} cannot be had from "
            f"the hub: {type(error).__name__}: {error}"
        ) from error
    digest = f"{name}:{config}:{chosen}:{builder.hash}" if stream else ""
    return DatasetSource(dataset, name, digest and hashlib.sha256(digest.encode()).hexdigest())


def choose_split(known: list[str], split: str | None, name: str) -> str:
    """``split``, or the only one that there is. Raises `DataError` that lists them."""
    if split is None and len(known) == 1:
        return known[0]
    if split is None:
        raise DataError(f"{name} has the splits {', '.join(known)}; choose one with 'split'.")
    if split not in known:
        raise DataError(
            f"{name} has no split {split!r}.{suggest(split, known)} Known: {', '.join(known)}."
        )
    return split
