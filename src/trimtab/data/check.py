"""Look through a source for what would go wrong: bad rows, rows that occur twice, rows that are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from trimtab.data.examples import Example, ExampleConfig, Outcomes, Problem, read_examples
from trimtab.data.render import Renders
from trimtab.data.shapes import parse_row
from trimtab.data.source import Source
from trimtab.errors import DataError


@dataclass
class Checked:
    """What was found in one source. ``problems`` are rows that are malformed, or errors by the configuration;
    ``repeated`` are pairs (origin, origin of the first such row); ``first`` is
    the first origin by key."""

    outcomes: Outcomes
    problems: list[Problem] = field(default_factory=list)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    first: dict[int, str] = field(default_factory=dict)

    def shared(self, other: Checked) -> list[tuple[str, str]]:
        """Rows that both sources have: (origin here, origin there)."""
        return [
            (origin, other.first[key]) for key, origin in self.first.items() if key in other.first
        ]


def check(source: Source, config: ExampleConfig, renderer: Renders | None = None) -> Checked:
    """Read all rows of ``source``. Without a ``renderer`` only their shape is checked, not their tokens.

    Raises what is wrong with all rows alike, such as chat messages for a tokenizer without a template.
    """
    found = Checked(Outcomes(config))
    for key, origin, problem in _found(source, renderer, found.outcomes):
        if problem is not None:
            if problem.fatal or problem.kind == "malformed":
                found.problems.append(problem)
        elif key in found.first:
            found.repeated.append((origin, found.first[key]))
        else:
            found.first[key] = origin
    return found


def _found(
    source: Source, renderer: Renders | None, outcomes: Outcomes
) -> Iterator[tuple[int, str, Problem | None]]:
    if renderer is not None:
        for item in read_examples(source, renderer, outcomes):
            if isinstance(item, Example):
                yield item.key, item.datum.origin, None
            else:
                yield 0, "", item
        return
    for row in source.rows():
        outcomes.read += 1
        try:
            record = parse_row(row)
        except DataError as error:
            problem = Problem("malformed", str(error), fatal=True)
            outcomes.add_problem(problem)
            yield 0, "", problem
            continue
        outcomes.shapes[record.shape] += 1
        outcomes.used += 1
        yield int.from_bytes(record.key()[:8], "big"), row.origin, None
    outcomes.filtered += source.dropped
