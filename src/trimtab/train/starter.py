"""A first recipe for a job: good values for a common task, fitted to a model and a data file, with every other
option beside them as a comment. The tasks are files below ``starters``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import islice
from textwrap import wrap
from typing import Any

import yaml
from pydantic import BaseModel

from trimtab.data.records import LabelledRecord, Record
from trimtab.data.shapes import parse_row
from trimtab.data.source import Source
from trimtab.errors import DataError, UnknownNameError, suggest
from trimtab.train.recipe import Recipe
from trimtab.train.recipe_file import load_yaml, make_recipe

LOOKED_AT = 20_000
MOST_LABELS = 50
FEW, HELD_OUT, TIMES = 30, 50, 6
"""Below so many rows none are held out; else about so many at least; measurements in a run."""
BY_SHAPE = {"labelled text": "classify", "text pair": "classify", "text": "text"}
"""The task that a shape of record suggests; any other is a chat."""


@cache
def tasks() -> dict[str, str]:
    """Name and purpose of each task."""
    folder = files("trimtab.train") / "starters"
    texts = {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    return {name: texts[name].splitlines()[0].removeprefix("# ") for name in sorted(texts)}


def starter(model: str, source: Source, path: str, task: str | None = None) -> tuple[str, str]:
    """(the task, a commented recipe). Without a ``task`` the shape of the first row decides.

    Raises:
        UnknownNameError: no such task.
        DataError: the first row cannot be read, or does not suit the task.
    """
    records = _records(source)
    first = next(records, None)
    if first is None:
        raise DataError(f"{source.name}: there is no row to look at.")
    task = task or BY_SHAPE.get(first.shape, "chat")
    if task not in tasks():
        raise UnknownNameError(
            f"unknown task {task!r}.{suggest(task, tasks())} Known: {', '.join(tasks())}."
        )
    text = (files("trimtab.train") / "starters" / f"{task}.yaml").read_text(encoding="utf-8")
    values = load_yaml(text, where=task)
    values = {"model": model, **values, "data": {"path": path, **values["data"]}}
    if task == "text" and first.shape != "text":
        raise DataError(
            f"{source.name} has rows of {first.shape}; the task 'text' is for plain text."
        )
    classifies = values.get("task") == "sequence-classification"
    if classifies and not isinstance(first, LabelledRecord):
        raise DataError(
            f"{source.name} has rows of {first.shape}; the task {task!r} is for labelled texts."
        )
    if isinstance(first, LabelledRecord):
        labels = _labels(source)
        values["data"] |= {"labels": labels} if classifies else _asked(labels)
    _fit(values, 1 + sum(1 for _ in records))
    recipe = make_recipe(values, where=task)
    head = [
        tasks()[task],
        f"Rows: {first.shape}. Look at them first: trimtab data preview this-file.yaml",
    ]
    return task, "\n".join(["# " + line for line in head]) + "\n\n" + commented(recipe, values)


def _records(source: Source) -> Iterator[Record]:
    for row in islice(source.rows(), LOOKED_AT):
        yield parse_row(row)


def _fit(values: dict[str, Any], rows: int) -> None:
    """Hold out enough of few rows to measure on, or nothing of very few; and measure a few times in the run."""
    data, measured = values["data"], values["eval"]
    if rows < FEW:
        del data["fraction"], measured["every"]
        measured.pop("patience", None)
        values.pop("checkpoint", None)
        return
    data["fraction"] = min(max(data["fraction"], round(HELD_OUT / rows, 2)), 0.3)
    size = values["batch"].get("size")
    if size is not None:
        steps = values["epochs"] * rows * (1 - data["fraction"]) / size
        measured["every"] = max(round(steps / TIMES), 1)


def _labels(source: Source) -> list[str]:
    """The labels of the rows; numbers as names that the user will change."""
    counts: Counter[str] = Counter()
    for record in _records(source):
        if isinstance(record, LabelledRecord) and record.label is not None:
            counts[str(record.label)] += 1
        if len(counts) > MOST_LABELS:
            raise DataError(
                f"{source.name} has more than {MOST_LABELS} different labels; a classifier needs few. "
                "For answers of their own, give prompt/completion rows."
            )
    names = sorted(counts)
    if names and all(name.lstrip("-").isdigit() for name in names):
        names = [f"label{name}" for name in names]  # to be renamed by the user
    return names


def _asked(names: list[str]) -> dict[str, Any]:
    """An instruction that names the labels."""
    question = f"Which of these fits the text: {', '.join(names)}? Answer with one of them only."
    return {"instruction": f"{question}\n\n{{text}}", "labels": names}


def commented(recipe: Recipe, values: Mapping[str, Any]) -> str:
    """All options of a recipe as YAML, each below its documentation; those not in ``values`` are comments."""
    return "\n".join(_lines(recipe, values, "")).rstrip() + "\n"


def _lines(config: BaseModel, values: Mapping[str, Any], indent: str) -> Iterator[str]:
    fields = type(config).model_fields
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in values):
        value = getattr(config, name)
        for line in wrap(field.description or "", 96 - len(indent)):
            yield f"{indent}# {line}"
        given = values.get(name)
        if isinstance(value, BaseModel):
            on = "" if name in values else "# "
            inner = given if isinstance(given, Mapping) else {}
            yield f"{indent}{on}{name}:"
            for line in _lines(value, inner, indent + "  "):
                yield line if on == "" or line.lstrip().startswith("#") else f"# {line}"
        else:
            plain = {name: given if given is not None else _plain(value)}
            text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
            on = "" if name in values else "# "
            yield from (f"{indent}{on}{line}".rstrip() for line in text.rstrip().splitlines())
        if not indent:
            yield ""


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
