"""``report.html``: one self-contained page, made from the run's folder alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab.data.preview import CLOSE, OPEN
from trimtab.errors import FileFormatError, StorageError
from trimtab.train.chart import Series, line_chart, smoothed
from trimtab.train.events import Event, read_events

SMOOTHING = 10
METRICS: tuple[tuple[str, str, Callable[[Event], Any]], ...] = (
    ("answers right", "share of examples", lambda event: (event["answers"] or {}).get("interval")),
    ("held-out loss", "nats per token", lambda event: event["loss"]),
    ("token accuracy", "share of tokens", lambda event: event["accuracy"]),
)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder.

    Raises:
        FileFormatError: the folder holds no run.
        StorageError: the disk refused.
    """
    events = read_events(folder / "events.jsonl")
    start = next((event for event in reversed(events) if event.get("event") == "start"), None)
    if start is None:
        raise FileFormatError(
            f"{folder} holds no run that has started (no 'start' in events.jsonl)."
        )
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    environment = Environment(
        loader=PackageLoader("trimtab.train", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"tokens": marked, "size": sized, "duration": timed}
    page = environment.get_template("report.html.j2").render(_facts(folder, events, start, recipe))
    path = folder / "report.html"
    temporary = folder / ".report.html"
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def _facts(
    folder: Path, events: list[Event], start: Event, recipe: dict[str, Any]
) -> dict[str, Any]:
    """Everything the page shows."""
    steps = [event for event in events if event.get("event") == "step"]
    evals = [event for event in events if event.get("event") == "eval"]
    before = next((event for event in evals if event["of"] == "base"), None)
    measured = [event for event in evals if event["of"] == "adapter"]
    end = next((event for event in reversed(events) if event.get("event") == "end"), None)
    after = measured[-1] if measured and end is not None else None
    seconds = sum(event["seconds"] for event in steps)
    tokens = steps[-1]["tokens"] if steps else 0
    return {
        "folder": folder.name,
        "start": start,
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        "finished": end is not None,
        "last": steps[-1]["step"] if steps else 0,
        "rows": _rows(before, after),
        "answers": (after or before or {}).get("answers"),
        "samples": _samples(before, after),
        "loss_chart": Markup(_loss_chart(steps, before, measured)),
        "rate_chart": Markup(_rate_chart(steps)),
        "seconds": seconds,
        "tokens": tokens,
        "speed": tokens / seconds if seconds else 0.0,
        "peak": end["peak_bytes"] if end is not None else 0,
    }


def _rows(before: Event | None, after: Event | None) -> list[dict[str, Any]]:
    """Metric by metric, before and after."""
    rows = []
    for name, unit, pick in METRICS:
        old, new = (None if event is None else pick(event) for event in (before, after))
        if old is None and new is None:
            continue
        apart = (
            old is not None
            and new is not None
            and (old["high"] < new["low"] or new["high"] < old["low"])
        )
        rows.append({"name": name, "unit": unit, "before": old, "after": new, "apart": apart})
    return rows


def _samples(before: Event | None, after: Event | None) -> list[dict[str, Any]]:
    """Answers before and after to the same prompts."""
    old = before["samples"] if before is not None else []
    new = after["samples"] if after is not None else []
    found = []
    for number in range(max(len(old), len(new))):
        first = old[number] if number < len(old) else None
        second = new[number] if number < len(new) else None
        shown = first or second or {}
        found.append(
            {
                "prompt": shown["prompt"],
                "reference": shown["reference"],
                "before": first,
                "after": second,
            }
        )
    return found


def _loss_chart(steps: list[Event], before: Event | None, measured: list[Event]) -> str:
    points = [
        (float(s["step"]), float(s["loss"])) for s in steps if isinstance(s["loss"], int | float)
    ]
    reach = min(SMOOTHING, len(points) // 20)
    held = [(0.0, before["loss"]["value"])] if before is not None else []
    held += [(float(event["step"]), event["loss"]["value"]) for event in measured]
    return line_chart(
        [
            Series("training loss", "faint", points if reach else []),
            Series("training loss", "first", smoothed(points, reach)),
            Series("held-out loss", "second", held, marks=True),
        ],
        x_name="step",
        y_name="loss",
    )


def _rate_chart(steps: list[Event]) -> str:
    points = [(float(step["step"]), float(step["lr"])) for step in steps]
    return line_chart(
        [Series("learning rate", "first", points)], x_name="step", y_name="learning rate"
    )


def sized(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return (
                f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
            )
        count /= 1024
    return f"{count:.2f} GiB"


def timed(seconds: float) -> str:
    """A duration in hours, minutes or seconds."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def marked(text: str) -> Markup:
    """A preview with its brackets turned into marks."""
    pieces = re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if number % 2 else escape(piece)
        for number, piece in enumerate(pieces)
    )
