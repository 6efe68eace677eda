"""All trackers of one run, as a listener on its events.

A tracked run is a function of ``events.jsonl``: a resumed run goes on in the same tracked run (its id is kept in
``trackers.json``), what the tool does not have yet is sent again, and what it has is not logged twice. A tool that
fails in the middle of training is told to the user once, and given up after a few failures in a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, FileFormatError, StorageError
from trimtab.registry import Registry
from trimtab.train.events import Event, Events, every_event, read_events
from trimtab.train.trackers.metrics import Metrics, Point
from trimtab.train.trackers.tracker import Status, Tracked, Tracker

IDS = "trackers.json"
PATIENCE = 3
LONGEST = 300  # characters of a tool's message that are shown
ENDS: Mapping[str, Status] = {
    "end": "finished", "interrupted": "interrupted", "halved": "interrupted", "error": "failed",
}  # fmt: skip

trackers: Registry[type[Tracker]] = Registry(
    "tracker",
    "trimtab.trackers",
    {
        "tensorboard": "trimtab.train.trackers.tensorboard:TensorBoard",
        "mlflow": "trimtab.train.trackers.mlflow:MLflow",
        "wandb": "trimtab.train.trackers.wandb:WandB",
        "trackio": "trimtab.train.trackers.trackio:Trackio",
    },
)


class Trackers:
    """The trackers named in a recipe.

    Raises:
        UnknownNameError: no such tracker; near names are suggested.
        MissingPackageError: its package is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._all = [trackers.get(name)() for name in dict.fromkeys(names)]
        self._live: list[_Guarded] = []
        self._metrics = Metrics()

    def follow(
        self, events: Events, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        """Start the trackers and listen; call it when the events say at which step the run goes on.

        Args:
            config: the resolved recipe.
            warn: shows one line to the user.

        Raises:
            ConfigError: a tool refused to start.
        """
        if not self._all:
            return
        folder = events.path.parent
        ids = _read_ids(folder / IDS)
        noted = _last_steps(every_event(events.path))
        past = [point for event in read_events(events.path) if (point := self._metrics.of(event))]
        for tracker in self._all:
            run = Tracked(folder.name, config, folder, ids.get(tracker.kind), noted)
            try:
                started = tracker.start(run)
            except Exception as error:
                raise ConfigError(
                    f"tracker {tracker.kind!r} could not start: {_line(error)} Mend that, or train without it."
                ) from error
            ids[tracker.kind] = started.id
            guarded = _Guarded(tracker, dict(started.logged), warn)
            self._live.append(guarded)
            for point in past:
                guarded.log(point)
        _write_ids(folder / IDS, ids)
        events.listen(self.on)

    def on(self, event: Event) -> None:
        """Pass one event on. Never raises because of a tool."""
        point = self._metrics.of(event)
        status = ENDS.get(event["event"])
        for tracker in self._live:
            if point is not None:
                tracker.log(point)
            if status is not None:
                tracker.finish(status)
        if status is not None:
            self._live = []


class _Guarded:
    """One tracker, no step of which is logged twice, and whose failures do not end the run."""

    def __init__(
        self, tracker: Tracker, logged: dict[str, int], warn: Callable[[str], None]
    ) -> None:
        self._tracker, self._logged, self._warn = tracker, logged, warn
        self._failed = self._in_a_row = 0

    def log(self, point: Point) -> None:
        new = {k: v for k, v in point.values.items() if self._logged.get(k, -1) < point.step}
        if not new or self._in_a_row >= PATIENCE:
            self._failed += bool(new)
            return
        try:
            self._tracker.log(new, point.step, point.time)
        except Exception as error:
            self._fail(f"at step {point.step}", error)
            return
        self._in_a_row = 0
        self._logged |= dict.fromkeys(new, point.step)

    def finish(self, status: Status) -> None:
        try:
            self._tracker.finish(status)
        except Exception as error:
            self._fail("at the end", error)
        if self._failed:
            self._warn(
                f"tracker {self._tracker.kind}: {self._failed} times nothing was logged; events.jsonl has everything."
            )

    def _fail(self, when: str, error: Exception) -> None:
        self._failed += 1
        self._in_a_row += 1
        if self._failed == 1:
            self._warn(
                f"tracker {self._tracker.kind} failed {when}: {_line(error)} Training goes on."
            )
        if self._in_a_row == PATIENCE:
            self._warn(
                f"tracker {self._tracker.kind}: {PATIENCE} failures in a row, it is given up."
            )


def _last_steps(events: Any) -> dict[str, int]:
    """The last step at which each metric was ever noted."""
    found: dict[str, int] = {}
    metrics = Metrics()
    for event in events:
        point = metrics.of(event)
        for name in () if point is None else point.values:
            found[name] = max(found.get(name, -1), event["step"])
    return found


def _read_ids(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in found.items()}
    except (ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{path} does not hold the ids of tracked runs ({error}); remove it to track the run anew."
        ) from error


def _write_ids(path: Path, ids: Mapping[str, str]) -> None:
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return text if text.endswith((".", "!", "?")) else f"{text}."
