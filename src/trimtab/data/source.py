"""Where records come from: `JsonlFile` is a sequence of lines that stays on disk (16 bytes of memory a line)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import overload

from trimtab.errors import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file as it was read; ``origin`` is ``file:line``."""

    raw: bytes
    origin: str


class JsonlFile(Sequence[Line]):
    """The lines of a JSONL file that are not blank.

    ``digest`` is the SHA-256 of the file's bytes. Raises `DataError` if there is no such file, or no
    line in it.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._offsets = array("q")
        self._numbers = array("q")
        content = sha256()
        try:
            with self.path.open("rb") as file:
                offset = 0
                for number, raw in enumerate(file, start=1):
                    content.update(raw)
                    if raw.strip():
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(raw)
        except OSError as error:
            raise DataError(
                f"cannot read the data file {str(path)!r}: {error.strerror}."
            ) from error
        if not self._offsets:
            raise DataError(
                f"{self.name}: the file has no records; it needs one JSON object a line."
            )
        self.digest = content.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Line]: ...
    def __getitem__(self, index: int | slice) -> Line | Sequence[Line]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return Line(file.readline(), f"{self.name}:{self._numbers[index]}")
