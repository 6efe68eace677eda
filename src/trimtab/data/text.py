"""A text file as a source of one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import final

from trimtab.data.source import FileSource, Row, check_text, sha256_of


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
