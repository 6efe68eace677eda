"""Rows that a program made, as a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, final

from trimtab.data.source import Row, Source
from trimtab.errors import DataError


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
