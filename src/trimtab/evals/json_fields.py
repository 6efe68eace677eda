"""JSON objects as answers (extraction): does it parse, is it equal, which fields are right.

A field is a path to a value that is no object or list (``"owner.name"``, ``"tags[0]"``; an empty object or list
is such a value). Field F1 is 2 · right / (fields of the answers + fields of the references), over all examples;
an answer that does not parse has no fields. Numbers are equal by value, everything else by type and value.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NoReturn, final

import numpy as np

from trimtab.errors import ConfigError
from trimtab.evals.intervals import Sums, bootstrap, wilson
from trimtab.evals.metrics import Metric, Scores

MOST_FIELDS = 50


@final
class Json(Metric):
    """The shares of answers that are JSON and that equal the reference, and F1 over fields."""

    kind: ClassVar[str] = "json"

    def check(self, references: Sequence[str]) -> None:
        for number, text in enumerate(references, start=1):
            if not isinstance(parsed(text), dict):
                raise ConfigError(
                    f"metric 'json' compares JSON objects, and reference {number} of {len(references)} is none: "
                    f"{text.strip()[:60]!r}."
                )

    def measure(self, references: Sequence[str], answers: Sequence[str]) -> Scores:
        wanted = [fields(parsed(text)) for text in references]
        values = [parsed(text) for text in answers]
        given = [{} if value is INVALID else fields(value) for value in values]
        pairs = list(zip(wanted, given, strict=True))
        right = [len(one.items() & other.items()) for one, other in pairs]
        rows = [
            (hits, len(one) + len(other)) for hits, (one, other) in zip(right, pairs, strict=True)
        ]
        count = len(answers)
        found = {
            "json_parsed": wilson(sum(value is not INVALID for value in values), count),
            "json_exact": wilson(sum(one == other for one, other in pairs), count),
            "json_fields": bootstrap(rows, _f1),
        }
        return Scores(found, fields=_by_field(pairs))


class _Invalid:
    """Not JSON."""


INVALID = _Invalid()


def parsed(text: str) -> Any:
    """The JSON value that ``text`` is, white space aside, or `INVALID`."""
    try:
        return json.loads(text.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return INVALID


def fields(value: Any) -> dict[str, str]:
    """Path -> value, both as text; the value of a whole number is the same as 2 and as 2.0."""
    return dict(_walk(value, ""))


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            # A key that looks like a path is quoted, so that no two paths are alike.
            name = key if key and not set(key) & set('.[]"') else json.dumps(key)
            yield from _walk(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for place, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{place}]")
    elif isinstance(value, float) and value.is_integer():
        yield path, json.dumps(int(value))
    else:
        yield path, json.dumps(value)


def _f1(sums: Sums) -> Sums:
    return np.asarray(2 * sums[:, 0] / np.maximum(sums[:, 1], 1))


def _by_field(pairs: Sequence[tuple[dict[str, str], dict[str, str]]]) -> dict[str, Any]:
    """The share of right values by field of the references; none where there are too many to read."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for wanted, given in pairs:
        for path, value in wanted.items():
            hits[path].append(given.get(path) == value)
    if len(hits) > MOST_FIELDS:
        return {}
    return {path: wilson(sum(found), len(found)) for path, found in hits.items()}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")
