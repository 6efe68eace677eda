"""The examples of a run: read, limited to the context, and split into trained and held-out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum, ExampleConfig, RenderConfig, Renderer, load_examples
from trimtab.errors import DataError
from trimtab.train.recipe import DataRecipe


@dataclass(frozen=True)
class Sources:
    """``notes`` are the sentences that say what was read, cut and dropped; ``digest`` is that of the file;
    ``overlap`` counts held-out examples that are trained on as well."""

    train: Sequence[Datum]
    held_out: Sequence[Datum]
    digest: str
    name: str
    notes: tuple[str, ...]
    overlap: int

    @property
    def longest(self) -> int:
        return max(len(datum) for datum in (*self.train, *self.held_out))


def read_sources(
    recipe: DataRecipe, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> Sources:
    """Read the files of a recipe; ``context`` is the most tokens that the model takes.

    Raises:
        DataError: rows that are errors by the recipe, or a split that leaves one side empty.
    """
    renderer = Renderer(tokenizer, RenderConfig(train=recipe.train, completions=recipe.completions))
    limits = [limit for limit in (recipe.max_tokens, context) if limit is not None]
    config = ExampleConfig(
        context=min(limits, default=None),
        too_long=recipe.too_long,
        masked=recipe.masked,
        bad_rows=recipe.bad_rows,
    )
    examples = load_examples(Path(recipe.path), renderer, config)
    notes = [f"{examples.name}: {examples.outcomes}"]
    train: Sequence[Datum] = examples.data
    held: Sequence[Datum] = ()
    if recipe.held_out is not None:
        others = load_examples(Path(recipe.held_out), renderer, config)
        notes.append(f"{others.name}: {others.outcomes}")
        held = others.data
    elif recipe.fraction:
        train, held = split(examples.data, recipe.fraction)
        notes.append(f"{len(held)} of {len(examples)} examples are held out.")
    known = {datum.tokens + datum.targets[-1:] for datum in train}
    overlap = sum(datum.tokens + datum.targets[-1:] in known for datum in held)
    return Sources(train, held, examples.digest, examples.name, tuple(notes), overlap)


def split(data: Sequence[Datum], fraction: float) -> tuple[list[Datum], list[Datum]]:
    """(trained, held out) by a hash of each example's tokens."""
    sides: tuple[list[Datum], list[Datum]] = ([], [])
    for datum in data:
        sides[_share(datum) < fraction].append(datum)
    if not sides[0] or not sides[1]:
        raise DataError(
            f"holding out {fraction:g} of {len(data)} examples leaves {len(sides[0])} to train and {len(sides[1])} "
            "held out; give more data, another fraction, or a held_out file."
        )
    return sides


def _share(datum: Datum) -> float:
    """A number in [0, 1) that depends on the example's tokens alone."""
    text = ",".join(map(str, (*datum.tokens, *datum.targets[-1:])))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
