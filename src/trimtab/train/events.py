"""``events.jsonl``: what happened in a run, one JSON object a line, only ever appended to.

A process that is killed may leave half a line; it is ended before the next one is written, and readers
pass over it. When a run resumes at step s, a ``resume`` event says so, and what was noted of later steps
no longer counts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import StorageError

Event = dict[str, Any]
UNDONE = ("step", "eval", "forgetting", "checkpoint", "end")
"""What no longer counts when a run resumes at an earlier step."""


class Events:
    """Appends to the events of one run. Each line reaches the system before `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listeners: list[Callable[[Event], None]] = []
        try:
            self._file = path.open("a+b", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            if size:
                self._file.seek(size - 1)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        except OSError as error:
            raise _refused(path, error) from error

    def add(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one event, then tell the listeners. Raises `StorageError` if the disk refuses it."""
        event = {"event": kind, "time": round(time.time(), 3), **_plain(fields)}
        try:
            self._file.write(f"{json.dumps(event, allow_nan=False)}\n".encode())
        except OSError as error:
            raise _refused(self.path, error) from error
        for listener in self._listeners:
            listener(event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call ``listener`` with every event from here on, once it is written."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Flush to disk and close."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self.path, error) from error
        finally:
            self._file.close()


def read_events(path: Path) -> list[Event]:
    """All whole events, in order; those that a later resume undid are left out."""
    kept: list[Event] = []
    for event in every_event(path):
        if event.get("event") == "resume":
            kept = [old for old in kept if not _undone(old, event["step"])]
        kept.append(event)
    return kept


def every_event(path: Path) -> Iterator[Event]:
    """All whole events, in order, also those that a later resume undid."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # torn by a kill
        if isinstance(event, dict):
            yield event


def _undone(event: Event, step: int) -> bool:
    return event.get("event") in UNDONE and event.get("step", 0) > step


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}. Free space, then resume the run."
    )
