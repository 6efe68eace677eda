"""Several runs side by side: one table, one page with their curves over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trimtab.errors import ConfigError
from trimtab.evals.intervals import Interval
from trimtab.train.chart import Series, kind_of, legend, line_chart, reach_of, smoothed
from trimtab.train.page import numbered, sized, timed, write_page
from trimtab.train.summary import RunSummary
from trimtab.train.trackers.tracker import flat

NONE = "–"
ASIDE = ("out", "name", "track", "checkpoint.")
"""Options that say where and how a run is kept, and nothing about what it computes."""


@dataclass(frozen=True)
class Row:
    """One fact of every run, as text."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given."""

    runs: tuple[RunSummary, ...]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Read the runs.

        Raises:
            FileFormatError: a folder that does not exist, or holds no run.
            ConfigError: fewer than two runs, or the same one twice.
        """
        places = [folder.resolve() for folder in folders]
        if len(places) < 2:
            raise ConfigError("name two runs or more to compare.")
        twice = next((folders[n] for n, place in enumerate(places) if place in places[:n]), None)
        if twice is not None:
            raise ConfigError(f"{twice} is named twice; name different runs.")
        return cls(tuple(RunSummary.read(folder) for folder in folders))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The runs' folders, with as much of their paths as tells them apart."""
        paths = [run.folder.resolve().parts for run in self.runs]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["/".join(parts[-length:]) for parts in paths]
            if len(set(names)) == len(names):
                break
        return tuple(names)

    @cached_property
    def warnings(self) -> list[str]:
        """Why numbers may not be comparable, or are missing."""
        found = []
        digests = [run.start.get("held_out_sha256") for run in self.runs if run.start["held_out"]]
        if len(set(digests)) > 1:
            found.append(
                "The runs were not measured on the same held-out examples (or cut them into other tokens): their "
                "held-out numbers cannot be compared."
            )
        elif None in digests:
            found.append(
                "These runs do not say which held-out examples they were measured on; compare their held-out numbers "
                "only if you know that they are the same."
            )
        texts = {f.weights for run in self.runs if (f := run.forgetting("base")) is not None}
        if len(texts) > 1:
            found.append("Forgetting was measured on different texts, or in other tokens.")
        found += [
            f"{name} is not finished (step {run.last} of {run.start['total']}): what is measured at the end is missing."
            for name, run in zip(self.names, self.runs, strict=True)
            if run.end is None
        ]
        return found

    @cached_property
    def differences(self) -> list[Row]:
        """The options in which the recipes differ, by their dotted names; of other methods, not theirs."""
        options = [flat(run.recipe) for run in self.runs]
        aside = (
            ASIDE if len({one.get("method.kind") for one in options}) == 1 else (*ASIDE, "method.")
        )
        keys = dict.fromkeys(key for one in options for key in one)
        rows = [Row(key, tuple(str(one.get(key, NONE)) for one in options)) for key in keys]
        return [row for row in rows if len(set(row.cells)) > 1 and not row.name.startswith(aside)]

    @cached_property
    def rows(self) -> list[Row]:
        """What the runs are and how they ended."""
        facts = [Row(name, tuple(map(show, self.runs))) for name, show in FACTS]
        metrics = dict.fromkeys(metric.name for run in self.runs for metric in run.metrics)
        facts += [Row(name, tuple(_metric(run, name) for run in self.runs)) for name in metrics]
        facts += [Row(name, tuple(map(show, self.runs))) for name, show in ENDINGS]
        return [row for row in facts if set(row.cells) != {NONE}]

    def numbers(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "runs": [
                {"name": name, **_numbers(run)}
                for name, run in zip(self.names, self.runs, strict=True)
            ],
            "differences": {
                row.name: dict(zip(self.names, row.cells, strict=True)) for row in self.differences
            },
            "warnings": self.warnings,
        }

    def write(self, path: Path) -> Path:
        """The page. Raises `StorageError`."""
        kinds = [kind_of(number) for number in range(len(self.runs))]
        named = list(zip(self.names, kinds, strict=True))
        facts = {
            "names": named,
            "rows": self.rows,
            "differences": self.differences,
            "warnings": self.warnings,
            "legend": Markup(legend(named)),
            "charts": [
                (title, Markup(self._chart(title, kinds, curve, marks=marks)))
                for title, curve, marks in (
                    ("Training loss", _training_curve, False),
                    ("Held-out loss", _held_out_curve, True),
                )
            ],
        }
        return write_page(path, "compare.html.j2", facts)

    def _chart(
        self,
        title: str,
        kinds: Sequence[str],
        curve: Callable[[RunSummary], list[tuple[float, float]]],
        *,
        marks: bool,
    ) -> str:
        lines = [
            Series(name, kind, curve(run), marks=marks)
            for name, kind, run in zip(self.names, kinds, self.runs, strict=True)
        ]
        return line_chart(lines, x_name="step", y_name=title.lower())


# -- cells -----------------------------------------------------------------------------------------


def _method(run: RunSummary) -> str:
    """As the plan shows it."""
    shown = (str(text) for name, text in run.start["plan"] if name == "method")
    return next(shown, NONE).removesuffix("()")


def _steps(run: RunSummary) -> str:
    return f"{run.last:,}" if run.end is not None else f"{run.last:,} of {run.start['total']:,}"


def _forgotten(run: RunSummary) -> str:
    change = run.forgotten
    if change is None:
        return NONE
    value, low, high = (_percent(x) for x in (change.value, change.low, change.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _gap(run: RunSummary) -> str:
    return NONE if run.gap is None else f"{run.gap:+.4f}"


FACTS: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
    ("method", _method),
    ("trained parameters", lambda run: f"{run.start['parameters']:,}"),
    ("steps", _steps),
    ("tokens", lambda run: f"{run.tokens:,}"),
    ("time", lambda run: timed(run.seconds)),
    ("tokens a second", lambda run: f"{run.speed:,.0f}"),
    ("peak memory", lambda run: sized(run.peak) if run.peak else NONE),
)
ENDINGS: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
    ("held-out minus training loss", _gap),
    ("perplexity of unrelated text", _forgotten),
)


def _metric(run: RunSummary, name: str) -> str:
    """Before, and after with its interval."""
    metric = next((one for one in run.metrics if one.name == name), None)
    if metric is None:
        return NONE
    before = NONE if metric.before is None else numbered(metric.before.value)
    after = metric.after
    if after is None:
        return f"{before} → {NONE}"
    shown = f"{numbered(after.value)} [{numbered(after.low)}, {numbered(after.high)}]"
    return f"{before} → {shown}"


def _percent(nats: float) -> float:
    """A change of the log of the perplexity, in per cent."""
    return 100 * math.expm1(min(nats, 500.0))


def _numbers(run: RunSummary) -> dict[str, Any]:
    def plain(interval: Interval | None) -> dict[str, Any] | None:
        return None if interval is None else asdict(interval)

    return {
        "folder": str(run.folder),
        "finished": run.end is not None,
        "method": run.recipe["method"],
        "parameters": run.start["parameters"],
        "steps": run.last,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.speed,
        "peak_bytes": run.peak or None,
        "metrics": {
            metric.name: {"before": plain(metric.before), "after": plain(metric.after)}
            for metric in run.metrics
        },
        "training_loss": plain(run.training_loss()),
        "gap": run.gap,
        "forgetting": plain(run.forgotten),
    }


def _training_curve(run: RunSummary) -> list[tuple[float, float]]:
    points = run.curve("loss")
    return smoothed(points, max(reach_of(points), 1))


def _held_out_curve(run: RunSummary) -> list[tuple[float, float]]:
    """Without the base, beside which the differences of the runs would be small, where there is more."""
    points = run.held_out_curve
    return points[1:] if len(points) > 2 and run.before is not None else points
