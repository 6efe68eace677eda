"""Which examples make a step, and how many steps a run has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from trimtab.data import Cursor, Datum, steps, visit
from trimtab.train.recipe import BatchRecipe, Recipe

Group = tuple[list[Datum], Cursor]


def groups(data: Iterable[tuple[Datum, Cursor]], batch: BatchRecipe) -> Iterator[Group]:
    """Steps of so many examples or tokens; none spans two epochs."""
    if batch.tokens is None:
        return steps(data, batch.examples)
    return _by_tokens(data, batch.tokens)


def _by_tokens(data: Iterable[tuple[Datum, Cursor]], tokens: int) -> Iterator[Group]:
    held: list[Datum] = []
    last: Cursor | None = None
    count = 0
    for datum, cursor in data:
        if held and last is not None and cursor["epoch"] != last["epoch"]:
            yield held, last
            held, count = [], 0
        held.append(datum)
        count += len(datum)
        last = cursor
        if count >= tokens:
            yield held, last
            held, count = [], 0
    if held and last is not None:
        yield held, last


def total_steps(data: Sequence[Datum], recipe: Recipe) -> int:
    """Steps of the whole run; with ``steps`` given, epochs go on for as long as it takes."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.batch.tokens is None:
        return recipe.epochs * -(-len(data) // recipe.batch.examples)
    return sum(1 for _ in groups(visit(data, epochs=recipe.epochs, seed=recipe.seed), recipe.batch))
