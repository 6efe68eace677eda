"""``report.html`` of a sweep: its table, and the curves of all variants over each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from trimtab.train.chart import Series, kind_of, legend, line_chart, reach_of, smoothed
from trimtab.train.page import write_page
from trimtab.train.summary import Points, RunSummary
from trimtab.train.sweep.summary import SweepSummary
from trimtab.train.sweep.variants import label_of


def write_sweep_report(folder: Path) -> Path:
    """Write it into a sweep's folder.

    Raises:
        FileFormatError: the folder holds no sweep.
        StorageError: the disk refused.
    """
    found = SweepSummary.read(folder)
    kinds = [kind_of(number) for number in range(len(found.lines))]
    names = [label_of(line.entry.choice) for line in found.lines]
    facts = {
        "name": folder.resolve().name,
        "winner": None if found.winner is None else label_of(found.winner.entry.choice),
        "adapter": str(folder / "adapter"),
        "header": found.header,
        "rows": [
            (kind, found.cells(line), line.won)
            for kind, line in zip(kinds, found.lines, strict=True)
        ],
        "legend": Markup(legend(list(zip(names, kinds, strict=True)))),
        "charts": [
            (title, Markup(_chart(found, title, names, kinds, curve, marks=marks)))
            for title, curve, marks in (
                ("Held-out loss", _held_out, True),
                ("Training loss", _training, False),
            )
        ],
    }
    return write_page(folder / "report.html", "sweep.html.j2", facts)


def _chart(
    found: SweepSummary,
    title: str,
    names: list[str],
    kinds: list[str],
    curve: Callable[[RunSummary], Points],
    *,
    marks: bool,
) -> str:
    lines = [
        Series(name, kind, curve(line.run), marks=marks)
        for name, kind, line in zip(names, kinds, found.lines, strict=True)
        if line.run is not None
    ]
    return line_chart(lines, x_name="step", y_name=title.lower())


def _training(run: RunSummary) -> Points:
    points = run.curve("loss")
    return smoothed(points, max(reach_of(points), 1))


def _held_out(run: RunSummary) -> Points:
    """Without the base, beside which the differences of the variants would be small."""
    return run.held_out_curve[1:] if run.before is not None else run.held_out_curve
