"""The examples of a run: opened, tokenised or found in the cache, mixed, and split into trained and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.data import (
    ClassRenderer,
    Corpus,
    CorpusFeed,
    Datum,
    ExampleConfig,
    Feed,
    Mapped,
    Outcomes,
    Portion,
    RenderConfig,
    Renderer,
    Renders,
    Source,
    StreamFeed,
    distinct,
    labels_in,
    open_source,
    read_examples,
    strict,
    tokenise,
    without,
)
from trimtab.data.tokenise import Progress
from trimtab.errors import DataError
from trimtab.train.recipe import DataRecipe, Recipe, SourceRecipe, TaskName

SAMPLE = 64
"""Examples of a stream that are looked at beforehand, for previews and lengths."""


@dataclass(frozen=True)
class Sources:
    """What a run learns from and is measured on.

    ``feed`` gives the steps; ``sample`` is all training examples, or the first few of a stream; ``whole`` tells
    which. ``notes`` are the sentences that say what was read, cut and dropped. ``contents`` are (name, digest) of
    the sources; ``overlap`` counts held-out examples that are
    trained on as well.
    """

    feed: Feed
    sample: Sequence[Datum]
    whole: bool
    held_out: Sequence[Datum]
    contents: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    overlap: int

    @property
    def name(self) -> str:
        return self.contents[0][0]


class Reader:
    """Opens sources as a recipe says. ``context`` is the most tokens that the model takes; ``labels`` are those of
    a classifier, which the recipe must name (see `with_labels`)."""

    def __init__(
        self,
        recipe: DataRecipe,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        progress: Progress | None = None,
        *,
        task: TaskName = "causal-lm",
    ) -> None:
        self.recipe = recipe
        self.labels = recipe.labels or () if task == "sequence-classification" else ()
        self.renderer: Renders = (
            ClassRenderer(tokenizer, self.labels)
            if task == "sequence-classification"
            else Renderer(tokenizer, render_config(recipe))
        )
        limits = [limit for limit in (recipe.max_tokens, context) if limit is not None]
        self.config = ExampleConfig(
            context=min(limits, default=None),
            too_long=recipe.too_long,
            masked=recipe.masked,
            bad_rows=recipe.bad_rows,
        )
        self._progress = progress

    def open(self, source: SourceRecipe, given: object = None) -> Source:
        """The source as `opened` gives it, read as it comes where the recipe says so."""
        return opened(source, given, stream=self.recipe.stream)

    def portion(self, source: Source, weight: float = 1.0) -> tuple[Portion, str]:
        """All its examples, and the sentence that says what became of its rows."""
        found, outcomes = tokenise(source, self.renderer, self.config, progress=self._progress)
        portion = Portion(found.file, found.chosen, found.name, found.digest, weight)
        return portion, f"{source.name} ({source.kind}): {outcomes}"


def opened(source: SourceRecipe, given: object = None, *, stream: bool = False) -> Source:
    """A source with the recipe's columns and functions applied; ``given`` stands in for its path."""
    what = source.path if given is None else given
    found = open_source(what, split=source.split, config=source.subset, stream=stream)
    if not (source.columns or source.ignore or source.map or source.filter):
        return found
    return Mapped(
        found,
        columns=source.columns,
        ignore=source.ignore,
        map=source.map,
        filter=source.filter,
    )


def render_config(recipe: DataRecipe) -> RenderConfig:
    """How records are rendered."""
    return RenderConfig(
        train=recipe.train,
        completions=recipe.completions,
        instruction=recipe.instruction,
        labels=recipe.labels,
        preference=recipe.preference,
    )


def with_labels(recipe: Recipe) -> Recipe:
    """The recipe of a classifier with the labels that its training data have, unless it names them itself.

    Raises:
        DataError: fewer than two labels, or very many.
    """
    if recipe.task != "sequence-classification" or recipe.data.labels is not None:
        return recipe
    sources = [opened(source) for source in (recipe.data, *recipe.data.mix)]
    return recipe.replace(data=recipe.data.replace(labels=labels_in(sources)))


def held_recipe(recipe: DataRecipe) -> SourceRecipe | None:
    """The held-out source; a bare path is read with the columns and functions of the training data."""
    if not isinstance(recipe.held_out, str):
        return recipe.held_out
    return SourceRecipe(
        path=recipe.held_out,
        columns=recipe.columns,
        ignore=recipe.ignore,
        map=recipe.map,
        filter=recipe.filter,
    )


def read_sources(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    data: object = None,
    held_out: object = None,
    progress: Progress | None = None,
) -> Sources:
    """Read the sources of a recipe.

    Args:
        context: the most tokens that the model takes.
        data, held_out: Python objects with rows, in the place of the recipe's paths.

    Raises:
        DataError: rows that are errors by the recipe, or a split that leaves one side empty.
    """
    reader = Reader(recipe.data, tokenizer, context, progress, task=recipe.task)
    held: list[Portion] = []
    notes: list[str] = []
    held_source = held_recipe(recipe.data)
    if held_source is not None:
        portion, note = reader.portion(reader.open(held_source, held_out))
        held, notes = [portion], [f"held out, {note}"]
    if recipe.data.stream:
        return _streamed(recipe, reader, Corpus(held), notes, data)
    portions, found = [], []
    for number, source in enumerate((recipe.data, *recipe.data.mix)):
        portion, note = reader.portion(
            reader.open(source, data if number == 0 else None), source.weight
        )
        portions.append(portion)
        found.append(note)
    if recipe.data.fraction:
        portions, held = _split(portions, recipe.data.fraction)
        total = sum(len(portion.chosen) for portion in (*portions, *held))
        count = sum(len(portion.chosen) for portion in held)
        found.append(f"{count:,} of {total:,} examples are held out.")
    contents = tuple((portion.name, str(portion.file.facts["content"])) for portion in portions)
    portions, overlap = _mixed(recipe.data, portions, Corpus(held), found)
    corpus, measured = Corpus(portions), Corpus(held)
    if not len(corpus):
        raise DataError("no example is left to train on.")
    feed = CorpusFeed(
        corpus, examples=recipe.batch.examples, tokens=recipe.batch.tokens, seed=recipe.seed
    )
    return Sources(feed, corpus, True, measured, contents, (*found, *notes), overlap)


def read_examples_of(
    recipe: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    *,
    held_out: bool,
    task: TaskName = "causal-lm",
) -> tuple[Corpus, tuple[str, ...]]:
    """The examples of a recipe's ``path`` and mix, or those that are held out; and what was read, in sentences.

    Raises:
        DataError: rows that are errors by the recipe, or no example is left.
    """
    reader = Reader(recipe, tokenizer, context, task=task)
    source = held_recipe(recipe) if held_out else None
    chosen = (source,) if source is not None else (recipe, *recipe.mix)
    found = [reader.portion(reader.open(one)) for one in chosen]
    portions, notes = [portion for portion, _ in found], tuple(note for _, note in found)
    if held_out and source is None:
        _, portions = _split(portions, recipe.fraction)
    return Corpus(portions), notes


def _mixed(
    recipe: DataRecipe, portions: list[Portion], held: Corpus, notes: list[str]
) -> tuple[list[Portion], int]:
    """The portions as they are trained on, and the count of held-out examples among them; adds to ``notes``."""
    kept, repeated = distinct(portions)
    overlap = int(np.isin(held.keys, Corpus(portions).keys).sum())
    if recipe.duplicates == "drop":
        portions, leaked = without(kept, held.keys)
        if repeated or leaked:
            notes.append(
                f"{repeated:,} duplicates and {leaked:,} examples that are held out were dropped."
            )
        overlap = 0
    elif repeated:
        notes.append(
            f"{repeated:,} examples occur more than once (data.duplicates=drop drops them)."
        )
    if len(portions) > 1:
        visits = [portion.weight * len(portion.chosen) for portion in portions]
        shares = [
            f"{visit / sum(visits):.0%} {portion.name} ({len(portion.chosen):,} × {portion.weight:g})"
            for visit, portion in zip(visits, portions, strict=True)
        ]
        notes.append("an epoch is " + ", ".join(shares) + ".")
    return portions, overlap


def _split(portions: list[Portion], fraction: float) -> tuple[list[Portion], list[Portion]]:
    """(trained, held out) by the key of each example."""
    pairs = [portion.parted(fraction) for portion in portions]
    train, held = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    counts = [sum(len(portion.chosen) for portion in side) for side in (train, held)]
    if not all(counts):
        raise DataError(
            f"holding out {fraction:g} of {sum(counts)} examples leaves {counts[0]} to train and {counts[1]} "
            "held out; give more data, another fraction, or a held_out file."
        )
    return train, held


def _streamed(
    recipe: Recipe, reader: Reader, held: Corpus, notes: list[str], data: object
) -> Sources:
    source = reader.open(recipe.data, data)
    outcomes = Outcomes(reader.config)
    made_of = (source.digest, reader.renderer.fingerprint(), reader.config.model_dump_json())
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32]
    feed = StreamFeed(
        lambda row: strict(read_examples(source, reader.renderer, outcomes, row)),
        digest,
        examples=recipe.batch.examples,
        tokens=recipe.batch.tokens,
        seed=recipe.seed,
    )
    sample: list[Datum] = []
    looked = Outcomes(reader.config)
    for example in strict(read_examples(source, reader.renderer, looked)):
        sample.append(example.datum)
        if len(sample) == SAMPLE:
            break
    if not sample:
        raise DataError(f"{source.name}: the stream has no example. {looked}")
    notes.insert(0, f"{source.name} ({source.kind}), streamed: of the first rows, {looked}")
    return Sources(feed, sample, False, held, ((source.name, source.digest),), tuple(notes), 0)
