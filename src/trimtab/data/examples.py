"""From lines of a file to datums, with every loss counted: read, used, truncated, dropped and why.

`load_examples` reads a file into memory; `stream_examples` is the same as a stage of the chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

from pydantic import Field

from trimtab.config import Config
from trimtab.data.datum import Datum
from trimtab.data.open import open_source
from trimtab.data.order import Cursor, visit
from trimtab.data.render import Renderer
from trimtab.data.shapes import parse_row
from trimtab.data.source import Row
from trimtab.errors import DataError

Kind = Literal["malformed", "too long", "only masked"]
SHOWN = 10


class ExampleConfig(Config):
    """What to do with examples that do not fit.

    ``context`` is the most tokens that the model is shown in one example (None: no limit).
    ``too_long``: stop with an ``error``, ``drop`` the example, or cut it on the ``left`` (the start
    goes) or ``right`` (the end goes). ``masked`` (no trained token) and ``bad_rows``: ``error`` or
    ``drop``. Whatever is cut or dropped is counted.
    """

    context: int | None = Field(default=None, ge=2)
    too_long: Literal["error", "drop", "left", "right"] = "error"
    masked: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row gave no example; ``fatal`` if the configuration says that this is an error."""

    kind: Kind
    reason: str
    fatal: bool


@dataclass
class Outcomes:
    """Counts of what became of the rows. ``str()`` is one printable sentence."""

    config: ExampleConfig
    read: int = 0
    used: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: Counter[Kind] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)  # the first few, for messages

    def add_problem(self, problem: Problem) -> None:
        """Count a row that gave no example."""
        self.dropped[problem.kind] += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)

    def __str__(self) -> str:
        text = f"{self.read} rows read: {self.used} used"
        if self.truncated:
            text += (
                f" ({self.truncated} of them cut on the {self.config.too_long} to "
                f"{self.config.context} tokens, {self.lost_tokens} tokens lost)"
            )
        total = self.dropped.total()
        if total:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.dropped.items()))
            text += f", {total} dropped ({kinds})"
        return text + "."


@dataclass(frozen=True)
class Examples(Sequence[Datum]):
    """The datums of a file in its order; ``digest`` is the SHA-256 of the file, ``name`` its name."""

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

    def visit(
        self, *, epochs: int | None = 1, seed: int | None = None, cursor: Cursor | None = None
    ) -> Iterator[tuple[Datum, Cursor]]:
        """Walk the examples in seeded order, resumable (see `trimtab.data.source.visit`)."""
        return visit(self.data, epochs=epochs, seed=seed, digest=self.digest, cursor=cursor)


def load_examples(
    path: object,
    renderer: Renderer,
    config: ExampleConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """All examples of a source: a path, or whatever `open_source` takes.

    ``progress(done, total)`` is called after each row. Raises one `DataError` that lists the first
    rows that are errors by ``config`` and counts the rest; also where no row is left.
    """
    file = open_source(path)
    outcomes = Outcomes(config or ExampleConfig())
    data: list[Datum] = []
    fatal: list[str] = []
    done = 0
    for done, row in enumerate(file.rows(), start=1):
        result = example(row, renderer, outcomes)
        if isinstance(result, Datum):
            data.append(result)
        elif result.fatal:
            fatal.append(result.reason)
        if progress is not None:
            progress(done, done if file.count is None else file.count)
    if fatal:
        more = f"\n… and {len(fatal) - SHOWN} more" if len(fatal) > SHOWN else ""
        head = f"{len(fatal)} of {done} rows of {file.name} cannot be used:\n"
        raise DataError(fatal[0] if len(fatal) == 1 else head + "\n".join(fatal[:SHOWN]) + more)
    if not data:
        first = outcomes.problems[0].reason
        raise DataError(f"{file.name}: no example is left. {outcomes} The first: {first}")
    return Examples(tuple(data), outcomes, file.name, file.digest)


def stream_examples(
    rows: Iterable[tuple[Row, Cursor]], renderer: Renderer, outcomes: Outcomes
) -> Iterator[tuple[Datum, Cursor]]:
    """The stage between `visit` over a `JsonlFile` and `steps`; counts into ``outcomes``.

    Raises `DataError` at the first row that is an error by the configuration.
    """
    for row, cursor in rows:
        result = example(row, renderer, outcomes)
        if isinstance(result, Datum):
            yield result, cursor
        elif result.fatal:
            raise DataError(result.reason)


def steps(data: Iterable[tuple[Datum, Cursor]], size: int) -> Iterator[tuple[list[Datum], Cursor]]:
    """Groups of ``size`` datums; the last of an epoch may be smaller, and none spans two epochs."""
    if size < 1:
        raise DataError(f"a step needs at least one example, not {size}.")
    held: list[Datum] = []
    last: Cursor | None = None
    for datum, cursor in data:
        if held and last is not None and cursor["epoch"] != last["epoch"]:
            yield held, last
            held = []
        held.append(datum)
        last = cursor
        if len(held) == size:
            yield held, last
            held = []
    if held and last is not None:
        yield held, last


def example(row: Row, renderer: Renderer, outcomes: Outcomes) -> Datum | Problem:
    """The example in a row, or why there is none; counted in ``outcomes``.

    Raises at once (`DataError`, `ConfigError`, `ModelError`) what is wrong with all rows alike, such
    as chat messages for a tokenizer without a template.
    """
    outcomes.read += 1
    config = outcomes.config
    try:
        record = parse_row(row)
    except DataError as error:
        return _problem(outcomes, "malformed", str(error), config.bad_rows == "error")
    renderer.require(record)
    try:
        datum = renderer.render(record).datum()
    except DataError as error:
        return _problem(outcomes, "malformed", str(error), config.bad_rows == "error")
    return _limited(datum, outcomes)


def _limited(datum: Datum, outcomes: Outcomes) -> Datum | Problem:
    config = outcomes.config
    over = 0 if config.context is None else len(datum) - config.context
    if over > 0 and config.too_long in ("error", "drop"):
        reason = (
            f"{datum.origin}: {len(datum)} tokens, more than the context of {config.context}. "
            "Raise the context, or set too_long to 'drop', 'left' or 'right'."
        )
        return _problem(outcomes, "too long", reason, config.too_long == "error")
    if over > 0:
        keep = slice(over, None) if config.too_long == "left" else slice(None, -over)
        datum = Datum(datum.tokens[keep], datum.targets[keep], datum.weights[keep], datum.origin)
    if not any(datum.weights):
        cut = f" after {over} tokens were cut" if over > 0 else ""
        reason = f"{datum.origin}: only masked tokens, nothing to learn{cut}."
        return _problem(outcomes, "only masked", reason, config.masked == "error")
    outcomes.used += 1
    if over > 0:
        outcomes.truncated += 1
        outcomes.lost_tokens += over
    return datum


def _problem(outcomes: Outcomes, kind: Kind, reason: str, fatal: bool) -> Problem:
    problem = Problem(kind, reason, fatal)
    outcomes.add_problem(problem)
    return problem
