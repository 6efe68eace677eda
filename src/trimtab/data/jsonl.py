"""JSON sources: one object a line (16 bytes of memory a line), or one list of objects.

JSON is read strictly: a key that occurs twice, NaN, and bytes that are not UTF-8 are faults of a row.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, final, overload

from trimtab.data.source import BOM, FileSource, Row, check_text, open_bytes
from trimtab.errors import DataError


@final
class JsonlFile(FileSource):
    """The lines of a JSONL file that are not blank, compressed by gzip or not.

    ``digest`` is the SHA-256 of the bytes (of the decompressed ones). Raises `DataError` if there is no
    such file, or no line in it.
    """

    def __init__(self, path: Path | str, name: str = "") -> None:
        super().__init__(path, name)
        self._offsets = array("q")
        self._numbers = array("q")
        content = sha256()
        with self.reading(), open_bytes(self.path) as file:
            offset = 0
            for number, raw in enumerate(file, start=1):
                if not offset:
                    check_text(raw, self.name)
                content.update(raw)
                if raw.strip():
                    if not self._offsets and raw.removeprefix(BOM).lstrip().startswith(b"["):
                        raise DataError(
                            f"{self.name}: this is a JSON list, and a JSONL file has one object a "
                            "line; let its name end with .json."
                        )
                    self._offsets.append(offset)
                    self._numbers.append(number)
                offset += len(raw)
        if not self._offsets:
            raise DataError(
                f"{self.name}: the file has no records; it needs one JSON object a line."
            )
        self.kind = "JSONL"
        self.digest = content.hexdigest()
        self.count: int = len(self._offsets)

    def rows(self, start: int = 0) -> Iterator[Row]:
        if start >= self.count:
            return
        self.check_unchanged()
        with self.reading(), open_bytes(self.path) as file:
            file.seek(self._offsets[start])
            index = start
            for raw in file:
                if not raw.strip():
                    continue
                yield decode_line(raw, f"{self.name}:{self._numbers[index]}", index)
                index += 1

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        places = range(self.count)[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return next(self.rows(places))


@final
class JsonFile(FileSource):
    """A JSON file that is one list; its rows are held in memory, their origin is the line they start on."""

    def __init__(self, path: Path | str, name: str = "") -> None:
        super().__init__(path, name)
        with self.reading():
            raw = self.path.read_bytes()
        check_text(raw, self.name)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name}: not UTF-8 (byte {error.start + 1}); convert the file."
            ) from error
        self.kind = "JSON, a list"
        self.digest = sha256(raw).hexdigest()
        self._rows = [
            Row(value, origin, fault, index)
            for index, (value, origin, fault) in enumerate(self._items(text))
        ]
        self.count = len(self._rows)
        if not self._rows:
            raise DataError(f"{self.name}: the list is empty; it needs one object a record.")

    def rows(self, start: int = 0) -> Iterator[Row]:
        return iter(self._rows[start:])

    def _items(self, text: str) -> Iterator[tuple[object, str, str]]:
        """Decode the list item by item, so that each has a line number and a fault of its own."""
        place = _skip(text, 0)
        if text[place : place + 1] != "[":
            raise DataError(f"{self.name}: expected a list of objects, [{{…}}, …].")
        place, line, counted = _skip(text, place + 1), 1, 0
        while text[place : place + 1] != "]":
            line, counted = line + text.count("\n", counted, place), place
            origin = f"{self.name}:{line}"
            value, fault = None, ""
            try:
                value, stop = STRICT.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                fault, stop = str(error), self._end(text, place)
            yield value, origin, fault and f"broken JSON: {fault}"
            place = _skip(text, stop)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] != "]":
                self._broken(text, place, "expected a comma or ] after an item")
        if _skip(text, place + 1) != len(text):
            self._broken(text, _skip(text, place + 1), "something follows the list")

    def _end(self, text: str, place: int) -> int:
        """Where an item ends that the strict decoder refuses: no JSON at all is an error of the file."""
        try:
            return json.JSONDecoder().raw_decode(text, place)[1]
        except json.JSONDecodeError as error:
            self._broken(text, error.pos, error.msg)
        except RecursionError:
            self._broken(text, place, "nested too deep")

    def _broken(self, text: str, place: int, reason: str) -> NoReturn:
        line = text.count("\n", 0, place) + 1
        column = place - text.rfind("\n", 0, place)
        raise DataError(f"{self.name}:{line}: broken JSON: {reason} (column {column}).")


def open_json(path: Path, name: str = "") -> JsonFile | JsonlFile:
    """A ``.json`` file: a list, or JSONL by another name. Raises `DataError` for one object."""
    with path.open("rb") as file:
        line = next((line for line in file if line.strip()), b"").removeprefix(BOM)
    if not line.lstrip().startswith(b"{"):
        return JsonFile(path, name)
    try:
        json.loads(line)
    except ValueError:
        raise DataError(
            f"{name or path.name}: the file is one JSON object over several lines, or broken; it needs "
            "a list of objects, or one object a line."
        ) from None
    return JsonlFile(path, name)


def decode_line(raw: bytes, origin: str, index: int = 0) -> Row:
    """The row in a line of JSONL."""
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark opens many files from Windows
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte {error.start + 1} of the line); convert the file."
        return Row(None, origin, fault, index)
    try:
        return Row(STRICT.decode(text), origin, "", index)
    except json.JSONDecodeError as error:
        fault = f"broken JSON: {error.msg} at column {error.colno}."
    except (ValueError, RecursionError) as error:
        fault = f"broken JSON: {error}"
    return Row(None, origin, fault, index)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object.")
    return seen


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")


STRICT = json.JSONDecoder(object_pairs_hook=_no_repeats, parse_constant=_no_constant)
