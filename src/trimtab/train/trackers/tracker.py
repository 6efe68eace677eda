"""What a tracker is: it is told of a run, then of metrics by step, then of the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.errors import MissingPackageError

Status = Literal["finished", "interrupted", "failed"]
PROJECT = "trimtab"
"""The project, or experiment, of runs where the tool's own settings name no other."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run as its trackers see it.

    ``config`` is the resolved recipe. ``id`` is what `Tracker.start` gave when the run was first tracked, None
    for a new one. ``noted`` is the last step at which each metric was noted before.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path
    id: str | None = None
    noted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """The tracked run's ``id``, to be continued by, and the last step that the tool has of each metric."""

    id: str
    logged: Mapping[str, int] = field(default_factory=dict)


class Tracker(ABC):
    """Sends the metrics of one run to one tool. Made before anything is computed; used from one thread.

    Raises:
        MissingPackageError: when it is made and its package is not installed.
    """

    kind: ClassVar[str]
    several: ClassVar[bool] = False
    """Whether a process can track several runs at once."""

    @abstractmethod
    def start(self, run: Tracked) -> Started:
        """Begin to track a run, or go on with the one of ``run.id``."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        """Metrics by name, at an optimiser step; ``time`` in seconds since 1970."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Send what is left, and close."""


def package(name: str, kind: str) -> Any:
    """The module that a tracker needs, imported now."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"tracker {kind!r} needs a package that is not installed ({error}): pip install 'trimtab[{kind}]'."
        ) from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, without those that are None."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value
    return found
