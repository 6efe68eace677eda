"""What a sweep's folder says of it: its variants, best first, and the cells of their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import FileFormatError
from trimtab.evals.intervals import Interval
from trimtab.train.page import numbered
from trimtab.train.summary import RunSummary
from trimtab.train.sweep.record import Entry, Record, Status
from trimtab.train.sweep.variants import VARIANTS, shown

NONE = "–"
ORDER: Mapping[Status, int] = {"finished": 0, "running": 1, "stopped": 2, "failed": 3}


@dataclass(frozen=True)
class Line:
    """One variant. ``run`` is None where it did not begin."""

    entry: Entry
    run: RunSummary | None
    won: bool

    @property
    def steps(self) -> str:
        """Those it took, of those it would have taken."""
        total = f"{self.entry.total:,}"
        return total if self.entry.status == "finished" else f"{self.last:,} of {total}"

    @property
    def last(self) -> int:
        return self.entry.step if self.run is None else max(self.run.last, self.entry.step)

    @property
    def loss(self) -> str:
        """On held-out data, where it was last judged, with its interval where that is known."""
        if self.entry.loss is None:
            return NONE
        events = [] if self.run is None else self.run.measured
        here = [e for e in events if e["loss"]["value"] == self.entry.loss]
        if not here:
            return numbered(self.entry.loss)
        interval = Interval(**here[-1]["loss"])
        return f"{numbered(interval.value)} [{numbered(interval.low)}, {numbered(interval.high)}]"

    @property
    def training(self) -> str:
        """The training loss of its last steps."""
        found = None if self.run is None else self.run.training_loss()
        return NONE if found is None else numbered(found.value)

    @property
    def parameters(self) -> str:
        return NONE if self.run is None else f"{self.run.start['parameters']:,}"

    @property
    def how(self) -> str:
        """How it ended."""
        if self.won:
            return "winner"
        if self.entry.status == "failed":  # why, its own report says
            return f"failed after step {self.entry.step}"
        return self.entry.status + (f": {self.entry.why}" if self.entry.why else "")


@dataclass(frozen=True)
class SweepSummary:
    """A sweep, finished or not; ``lines`` are best first."""

    folder: Path
    record: Record
    lines: Sequence[Line]

    @classmethod
    def read(cls, folder: Path) -> SweepSummary:
        """Read a sweep's folder.

        Raises:
            FileFormatError: it holds no sweep.
        """
        record = Record.read(folder)
        ranked = sorted(record.entries, key=_rank)
        lines = [Line(e, _run(folder, e), e.number == record.winner) for e in ranked]
        return cls(folder, record, lines)

    @property
    def keys(self) -> list[str]:
        """The options that vary."""
        return list(dict.fromkeys(key for line in self.lines for key in line.entry.choice))

    @property
    def header(self) -> list[str]:
        return [
            "#",
            *self.keys,
            "trained",
            "steps",
            "training loss",
            "held-out loss",
            "how it ended",
        ]

    def cells(self, line: Line) -> list[str]:
        """One row of the table."""
        choice = [shown(line.entry.choice.get(key, NONE)) for key in self.keys]
        return [
            str(line.entry.number), *choice, line.parameters, line.steps, line.training, line.loss, line.how
        ]  # fmt: skip

    @property
    def winner(self) -> Line | None:
        """The best of those that were trained to their end."""
        return next((line for line in self.lines if line.won), None)

    def numbers(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "folder": str(self.folder),
            "winner": self.record.winner,
            "variants": [
                {**asdict(line.entry), "folder": str(folder_of(self.folder, line.entry))}
                for line in self.lines
            ],
        }


def folder_of(folder: Path, entry: Entry) -> Path:
    """The run of a variant."""
    return folder / VARIANTS / f"{entry.number:03d}"


def _rank(entry: Entry) -> tuple[float, ...]:
    """Those that came further are before those that were stopped earlier, whatever their losses."""
    share = entry.step / entry.total if entry.status == "stopped" and entry.total else 0.0
    loss = float("inf") if entry.loss is None else entry.loss
    return ORDER[entry.status], -share, loss, entry.number


def _run(folder: Path, entry: Entry) -> RunSummary | None:
    try:
        return RunSummary.read(folder_of(folder, entry))
    except FileFormatError:
        return None
