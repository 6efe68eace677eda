"""Evaluations as tables on a terminal, and as a JSON file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from trimtab.errors import StorageError
from trimtab.evals import Evaluation, Interval
from trimtab.evals.answers import normalised
from trimtab.evals.labels import ClassTable

ACCURACY = "token accuracy"
MOST_COLUMNS = 8
"""Classes up to which the confusion table is shown; the JSON file has it always."""
UNBOUNDED = 10_000
JUDGED = ("choice", "exact", "f1_micro")
"""Values that are to be seen beside what the commonest reference alone would reach."""


def show(console: Console, rows: Sequence[Evaluation], facts: Mapping[str, Any]) -> None:
    """One table of all values, then tables by class and by field where there are any."""
    for note in facts.get("notes", ()):
        console.print(note)
    unit = str(facts.get("unit", "token"))
    cells = {_title(row): _values(row) for row in rows}
    counts = {name: value.count for row in rows for name, value in _intervals(row).items()}
    heads = {
        name: f"{unit + ' accuracy' if name == ACCURACY else name}\nn = {count}"
        for name, count in counts.items()
    }
    console.print(_fitting(console, cells, heads | {"seconds": "seconds"}))
    console.print("95 % intervals in brackets.")
    if any(name in counts for name in JUDGED):
        references = [normalised(text) for text in facts["references"]]
        (said, times), *_ = Counter(references).most_common(1)
        if times > 1:
            share = times / len(references)
            console.print(f"Always answering {said!r} would be right {share:.4g} of the time.")
    for row in rows:
        for found in row.scores.values():
            if found.classes is not None:
                console.print(f"\n{_title(row)}, by class", style="bold")
                console.print(_by_class(console, found.classes))
            if found.fields:
                console.print(f"\n{_title(row)}, by field", style="bold")
                fields = {
                    name: {"right": _text(value), "n": str(value.count)}
                    for name, value in found.fields.items()
                }
                console.print(_fitting(console, fields, {"right": "right", "n": "n"}))


def _title(row: Evaluation) -> str:
    return row.adapter or "base"


def _intervals(row: Evaluation) -> dict[str, Interval]:
    loss = {} if row.held_out is None else {
        "loss": row.held_out.loss,
        ACCURACY: row.held_out.accuracy,
    }  # fmt: skip
    return {**loss, **row.metrics}


def _values(row: Evaluation) -> dict[str, str]:
    shown = {name: _text(value) for name, value in _intervals(row).items()}
    return {**shown, "seconds": f"{row.seconds:.1f}"}


def _text(value: Interval) -> str:
    if value.count == 0:
        return "–"
    known = f"\n[{value.low:.4g}, {value.high:.4g}]" if math.isfinite(value.low) else ""
    return f"{value.value:.4g}{known}"


def _by_class(console: Console, classes: ClassTable) -> Table:
    """Precision, recall and F1 by class; and of not too many classes, what was said instead."""
    said = [*(f"said {label}" for label in classes.labels), "unreadable"]
    cells: dict[str, dict[str, str]] = {}
    for row, counts in zip(classes.rows, classes.confusion, strict=True):
        cells[row.label] = {
            "precision": _text(row.precision),
            "recall": _text(row.recall),
            "F1": f"{row.f1:.4g}",
            "references": str(row.references),
            **{name: str(count) for name, count in zip(said, counts, strict=True)},
        }
    few = len(classes.labels) <= MOST_COLUMNS
    heads = ["precision", "recall", "F1", "references", *(said if few else said[-1:])]
    return _fitting(console, cells, {head: head for head in heads})


def _fitting(
    console: Console, cells: Mapping[str, Mapping[str, str]], heads: Mapping[str, str]
) -> Table:
    """A table with a row for each of ``cells``; turned on its side where it is wider than the terminal."""
    table = _table(cells, heads)
    wide = console.options.update(max_width=UNBOUNDED)
    if Measurement.get(console, wide, table).maximum <= console.width:
        return table
    turned = {
        head.replace("\n", ", "): {title: row.get(name, "–") for title, row in cells.items()}
        for name, head in heads.items()
    }
    return _table(turned, {title: title for title in cells})


def _table(cells: Mapping[str, Mapping[str, str]], heads: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for head in heads.values():
        table.add_column(Text(head), justify="right", no_wrap=True)
    for title, row in cells.items():
        table.add_row(Text(title), *(Text(row.get(name, "–")) for name in heads))
    return table


def write(path: Path, rows: Sequence[Evaluation], facts: Mapping[str, Any]) -> None:
    """Write everything as JSON; a number that is not known is null."""
    results = [{**row.fields(), "answers": list(row.answers)} for row in rows]
    text = json.dumps(_known({**facts, "results": results}), indent=2, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(f"{text}\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error


def _known(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _known(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_known(inner) for inner in value]
    return value
