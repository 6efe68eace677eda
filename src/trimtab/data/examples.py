"""From rows to datums, with every loss counted: read, used, truncated, dropped and why.

`read_examples` is a stage of the chain; `load_examples` reads a small source into memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import Field

from trimtab.config import Config
from trimtab.data.datum import Datum
from trimtab.data.open import open_source
from trimtab.data.records import Record, TextRecord
from trimtab.data.render import Renders
from trimtab.data.shapes import parse_row
from trimtab.data.source import Row, Source
from trimtab.errors import DataError

Kind = Literal["malformed", "too long", "only masked"]
SHOWN = 10


class ExampleConfig(Config):
    """What to do with examples that do not fit.

    ``context`` is the most tokens that the model is shown in one example (None: no limit).
    ``too_long``: stop with an ``error``, ``drop`` the example, cut it on the ``left`` (the start
    goes) or ``right`` (the end goes), or ``split`` plain text into pieces that fit (nothing is lost).
    ``masked`` (no trained token) and ``bad_rows``: ``error`` or ``drop``. Whatever is cut or dropped
    is counted.
    """

    context: int | None = Field(default=None, ge=2)
    too_long: Literal["error", "drop", "left", "right", "split"] = "error"
    masked: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"


@dataclass(frozen=True, slots=True)
class Example:
    """An example, the key of its record (64 bits; a piece of a split text has one of its own), and the
    index of the row that it came from."""

    datum: Datum
    key: int
    row: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row gave no example; ``fatal`` if the configuration says that this is an error."""

    kind: Kind
    reason: str
    fatal: bool


@dataclass
class Outcomes:
    """Counts of what became of the rows. ``str()`` is one printable sentence.

    ``filtered`` rows were left out by the user's own functions; ``shapes`` counts the records by shape;
    ``pieces`` is how many examples the texts that were split gave.
    """

    config: ExampleConfig
    read: int = 0
    used: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    split: int = 0
    pieces: int = 0
    filtered: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[Kind] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)  # the first few, for messages

    def add_problem(self, problem: Problem) -> None:
        """Count a row that gave no example."""
        self.dropped[problem.kind] += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            **vars(self),
            "config": self.config.model_dump(mode="json"),
            "problems": [asdict(problem) for problem in self.problems],
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Outcomes:
        """What `fields` gave."""
        return cls(
            **{
                **fields,
                "config": ExampleConfig.parse(fields["config"]),
                "shapes": Counter(fields["shapes"]),
                "dropped": Counter(fields["dropped"]),
                "problems": [Problem(**problem) for problem in fields["problems"]],
            }
        )

    def __str__(self) -> str:
        shapes = " and ".join(self.shapes) or "no record"
        text = f"{self.read:,} rows of {shapes}: {self.used:,} used"
        if self.truncated:
            text += (
                f" ({self.truncated:,} of them cut on the {self.config.too_long} to "
                f"{self.config.context} tokens, {self.lost_tokens:,} tokens lost)"
            )
        if self.split:
            text += (
                f" ({self.split:,} of them split into {self.pieces:,} pieces of at most "
                f"{self.config.context} tokens)"
            )
        if self.filtered:
            text += f", {self.filtered:,} left out by your filter"
        total = self.dropped.total()
        if total:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.dropped.items()))
            text += f", {total:,} dropped ({kinds})"
        return text + "."


@dataclass(frozen=True)
class Examples(Sequence[Datum]):
    """The datums of a source in its order; ``digest`` is that of its content, ``name`` its name."""

    data: tuple[Datum, ...]
    outcomes: Outcomes
    name: str = ""
    digest: str = ""

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Datum: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Datum]: ...
    def __getitem__(self, index: int | slice) -> Datum | Sequence[Datum]:
        return self.data[index]


def load_examples(
    source: Source | Path | str, renderer: Renders, config: ExampleConfig | None = None
) -> Examples:
    """All examples of a source, in memory.

    Raises one `DataError` that lists the first rows that are errors by ``config`` and counts the rest;
    also where no example is left.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    outcomes = Outcomes(config or ExampleConfig())
    found = whole(read_examples(opened, renderer, outcomes), opened, outcomes)
    data = tuple(example.datum for example in found)
    return Examples(data, outcomes, opened.name, opened.digest)


def read_examples(
    source: Source, renderer: Renders, outcomes: Outcomes, start: int = 0
) -> Iterator[Example | Problem]:
    """The examples of all rows from ``start`` on, and why others gave none; counted in ``outcomes``.

    Raises at once (`DataError`, `ConfigError`, `ModelError`) what is wrong with all rows alike, such
    as chat messages for a tokenizer without a template.
    """
    for row in source.rows(start):
        yield from _of_row(row, renderer, outcomes)
    outcomes.filtered += source.dropped


def strict(found: Iterator[Example | Problem]) -> Iterator[Example]:
    """The examples alone. Raises `DataError` at the first row that is an error by the configuration."""
    for item in found:
        if isinstance(item, Example):
            yield item
        elif item.fatal:
            raise DataError(item.reason)


def whole(
    found: Iterator[Example | Problem], source: Source, outcomes: Outcomes
) -> Iterator[Example]:
    """The examples alone; at the end one `DataError` for all rows that are errors by the configuration, or
    for want of any example."""
    fatal: list[str] = []
    count = 0
    for item in found:
        if isinstance(item, Example):
            yield item
        elif item.fatal:
            count += 1
            if len(fatal) < SHOWN:
                fatal.append(item.reason)
    if count:
        more = f"\n… and {count - SHOWN} more" if count > SHOWN else ""
        head = f"{count} of {outcomes.read} rows of {source.name} cannot be used:\n"
        raise DataError(fatal[0] if count == 1 else head + "\n".join(fatal) + more)
    if not outcomes.used:
        first = f" The first: {outcomes.problems[0].reason}" if outcomes.problems else ""
        raise DataError(f"{source.name}: no example is left. {outcomes}{first}")


def _of_row(row: Row, renderer: Renders, outcomes: Outcomes) -> Iterator[Example | Problem]:
    outcomes.read += 1
    fatal = outcomes.config.bad_rows == "error"
    try:
        record = parse_row(row)
    except DataError as error:
        yield _problem(outcomes, "malformed", str(error), fatal)
        return
    renderer.require(record)
    try:
        datum = renderer.render(record).datum()
    except DataError as error:
        yield _problem(outcomes, "malformed", str(error), fatal)
        return
    outcomes.shapes[record.shape] += 1
    key = int.from_bytes(record.key()[:8], "big")
    for piece in _limited(datum, record, renderer, outcomes):
        if isinstance(piece, Problem):
            yield piece
        else:
            yield Example(piece, key, row.index)
            key = int.from_bytes(sha256(key.to_bytes(8, "big")).digest()[:8], "big")


def _limited(
    datum: Datum, record: Record, renderer: Renders, outcomes: Outcomes
) -> list[Datum | Problem]:
    config = outcomes.config
    over = 0 if config.context is None else len(datum) - config.context
    pieces = [datum]
    if over > 0 and config.too_long == "split" and isinstance(record, TextRecord):
        pieces = _split(datum, config.context or 0)
        outcomes.split += 1
        outcomes.pieces += len(pieces)
    elif over > 0 and config.too_long in ("error", "drop", "split"):
        return [_too_long(datum, record, outcomes)]
    elif over > 0:
        pieces = [renderer.shortened(datum, config.context or 0, config.too_long)]
    if not any(pieces[0].weights):
        cut = f" after {over} tokens were cut" if over > 0 else ""
        reason = f"{datum.origin}: only masked tokens, nothing to learn{cut}."
        return [_problem(outcomes, "only masked", reason, config.masked == "error")]
    outcomes.used += 1
    if over > 0 and len(pieces) == 1:
        outcomes.truncated += 1
        outcomes.lost_tokens += over
    return list(pieces)


def _too_long(datum: Datum, record: Record, outcomes: Outcomes) -> Problem:
    config = outcomes.config
    cures = "'drop', 'left', 'right'" + (" or 'split'" if isinstance(record, TextRecord) else "")
    reason = (
        f"{datum.origin}: {len(datum)} tokens, more than the context of {config.context}. "
        f"Raise the context, or set too_long to {cures}."
    )
    if config.too_long == "split":
        reason += " Only plain text can be split."
    return _problem(outcomes, "too long", reason, config.too_long != "drop")


def _split(datum: Datum, context: int) -> list[Datum]:
    """Pieces of at most ``context`` tokens; each target is learnt in exactly one of them."""
    return [
        Datum(
            datum.tokens[start : start + context],
            datum.targets[start : start + context],
            datum.weights[start : start + context],
            datum.origin,
        )
        for start in range(0, len(datum), context)
    ]


def _problem(outcomes: Outcomes, kind: Kind, reason: str, fatal: bool) -> Problem:
    problem = Problem(kind, reason, fatal)
    outcomes.add_problem(problem)
    return problem
