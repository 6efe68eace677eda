"""``report.html``: one self-contained page, made from the run's folder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from trimtab.evals.intervals import Interval
from trimtab.train.advice import advice, forgetting_sentence, gap_sentence
from trimtab.train.chart import Series, legend, line_chart, reach_of, smoothed
from trimtab.train.events import Event
from trimtab.train.page import write_page
from trimtab.train.profile import Profile
from trimtab.train.summary import Metric, RunSummary

MIDDLES = 2
"""Of how many measurements in the middle of a run the samples are shown."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Raises:
        FileFormatError: the folder holds no run.
        StorageError: the disk refused.
    """
    run = RunSummary.read(folder)
    return write_page(folder / "report.html", "report.html.j2", _facts(run))


def _facts(run: RunSummary) -> dict[str, Any]:
    """Everything the page shows."""
    return {
        "run": run,
        "start": run.start,
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        "rows": [_row(metric) for metric in run.metrics],
        "change": run.change,
        "answers": (run.after or run.before or {}).get("answers"),
        "samples": _samples(run),
        "loss_chart": Markup(_loss_chart(run)),
        "charts": [(name, Markup(chart)) for name, chart in _small_charts(run) if chart],
        "train_loss": run.training_loss(),
        "gap_sentence": gap_sentence(run),
        "forgetting_sentence": forgetting_sentence(run),
        "unrelated": [(of, found) for of in ("base", "adapter") if (found := run.forgetting(of))],
        "text": run.unrelated[-1].get("text", "") if run.unrelated else "",
        "advice": advice(run),
        "profile": None if run.profile is None else Profile.of(run.profile),
        "notes": [text for name, text in run.start["plan"] if name in ("data", "careful")],
    }


def _row(metric: Metric) -> dict[str, Any]:
    """A metric, and where its two intervals lie on a common scale, in per cent."""
    known = [one for one in (metric.before, metric.after) if one is not None]
    low, high = min(one.low for one in known), max(one.high for one in known)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def place(one: Interval | None) -> dict[str, float] | None:
        if one is None:
            return None
        left, right, at = (100 * (x - low) / (high - low) for x in (one.low, one.high, one.value))
        return {"left": round(left, 2), "width": round(right - left, 2), "at": round(at, 2)}

    return {
        "name": metric.name,
        "unit": metric.unit,
        "before": metric.before,
        "after": metric.after,
        "apart": metric.apart,
        "strips": [("base", place(metric.before)), ("adapter", place(metric.after))],
    }


def _samples(run: RunSummary) -> list[dict[str, Any]]:
    """Answers to the same prompts: of the base, in the middle of the run, and of the adapter."""
    columns: list[tuple[str, Sequence[dict[str, Any]]]] = []
    if run.before is not None:
        columns.append(("base", run.before["samples"]))
    middle = [event for event in run.measured if event is not run.after and event.get("samples")]
    columns += [(f"step {event['step']}", event["samples"]) for event in _spread(middle)]
    if run.after is not None:
        columns.append(("adapter", run.after["samples"]))
    found = []
    for number in range(max((len(samples) for _, samples in columns), default=0)):
        shown = [(name, samples[number]) for name, samples in columns if number < len(samples)]
        first = shown[0][1]
        found.append({"prompt": first["prompt"], "reference": first["reference"], "answers": shown})
    return found


def _spread(events: Sequence[Event]) -> list[Event]:
    """At most `MIDDLES` events, evenly chosen."""
    if len(events) <= MIDDLES:
        return list(events)
    return [events[(n + 1) * len(events) // (MIDDLES + 1)] for n in range(MIDDLES)]


def _loss_chart(run: RunSummary) -> str:
    points = run.curve("loss")
    reach = reach_of(points)
    lines = [
        Series("training loss", "faint", points if reach else []),
        Series("training loss", "c1", smoothed(points, reach)),
        Series("held-out loss", "c2", run.held_out_curve, marks=True),
    ]
    keys = [("training", "c1")] if points else []
    keys += [("held out", "c2")] if run.held_out_curve else []
    chart = line_chart(lines, x_name="step", y_name="loss")
    return chart + legend(keys) if chart else ""


def _small_charts(run: RunSummary) -> list[tuple[str, str]]:
    """Title and chart of what is looked at when something went wrong."""
    found = []
    for title, points, smooth in (
        ("Gradient norm, before clipping", run.curve("grad_norm"), True),
        ("Tokens a second", run.speed_curve, True),
        ("Learning rate", run.curve("lr"), False),
    ):
        reach = reach_of(points) if smooth else 0
        lines = [
            Series(title, "faint", points if reach else []),
            Series(title, "c1", smoothed(points, reach)),
        ]
        found.append((title, line_chart(lines, x_name="step", y_name=title, tall=False)))
    return found
