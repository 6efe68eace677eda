"""Which examples make a step, in which order, and the cursor from which a run goes on at the exact example.

A feed gives ``(examples of a step, cursor)``. The cursor that came with a step, given back, continues with the
step after it; all else is a function of the seed, so what must be stored to resume is one small JSON object.

A step is so many examples, or as many as fit a budget of tokens: best-fit decreasing over a window of the order,
then the steps of the window in an order of their own. No step spans two epochs.

`CorpusFeed` knows all examples (they lie tokenised on disk) and shuffles the whole epoch. `StreamFeed` reads and
tokenises as it goes, in constant memory, and shuffles within windows of the rows.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from trimtab.data.batch import pack
from trimtab.data.corpus import Corpus
from trimtab.data.datum import Datum
from trimtab.data.examples import Example
from trimtab.data.tokenise import PACKED, kept_lists, token_cache
from trimtab.errors import DataError

WINDOW = 4096


class Cursor(TypedDict):
    """Where a feed stands: ``position`` steps of ``epoch`` are done (of a stream: of the window that begins at
    ``row``). The rest says what was being visited, so that resuming over other data is an error."""

    epoch: int
    row: int
    position: int
    items: int | None
    seed: int
    digest: str


Step = tuple[list[Datum], Cursor]


class Feed(ABC):
    """Gives steps. ``digest`` says what is visited, and how it is cut into steps."""

    digest: str

    @abstractmethod
    def total(self, epochs: int) -> int | None:
        """Steps of so many epochs; None where they cannot be known beforehand."""

    @abstractmethod
    def steps(self, epochs: int | None, cursor: Cursor | None = None) -> Iterator[Step]:
        """All steps after ``cursor`` (``epochs`` None: for ever).

        Raises `DataError` when the cursor belongs to other data or another order.
        """


class CorpusFeed(Feed):
    """Steps over a corpus, every epoch in another order.

    Args:
        examples, tokens: how much a step holds; exactly one of them.
        cache: where what was packed is kept, named by a hash of the examples, budget, seed and epoch; None is
            beside the tokens (`token_cache`).
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        examples: int | None,
        tokens: int | None,
        seed: int,
        cache: Path | None = None,
    ) -> None:
        self.corpus, self.seed = corpus, seed
        self._cache = (cache or token_cache()) / PACKED
        self._cut = _Cut(examples, tokens)
        self.digest = f"{corpus.digest}:{self._cut}"
        if tokens is not None and int(corpus.lengths.max()) > tokens:
            longest = corpus[int(corpus.lengths.argmax())]
            raise DataError(
                f"{longest.origin}: {len(longest)} tokens, more than a step may have ({tokens}); raise "
                "batch.tokens, or shorten the example."
            )

    def epoch(self, epoch: int) -> list[list[int]]:
        """The steps of that epoch, as indices into the corpus."""
        if self._cut.tokens is None:  # nothing is packed
            return self._steps_of(epoch)
        name = hashlib.sha256(f"{self.digest}:{self.seed}:{epoch}".encode()).hexdigest()[:32]
        return kept_lists(self._cache / f"{name}.npy", lambda: self._steps_of(epoch))

    def _steps_of(self, epoch: int) -> list[list[int]]:
        order = self.corpus.order(epoch, self.seed)
        found: list[list[int]] = []
        for number, start in enumerate(range(0, len(order), self._cut.window)):
            chosen = order[start : start + self._cut.window]
            draw = random.Random(f"{self.seed}:{epoch}:{number}")
            found += self._cut(chosen, [int(self.corpus.lengths[i]) for i in chosen], draw)
        return found

    def total(self, epochs: int) -> int:
        if self._cut.examples is not None:
            return epochs * -(-len(self.corpus.order(0, self.seed)) // self._cut.examples)
        return sum(len(self.epoch(epoch)) for epoch in range(epochs))

    def steps(self, epochs: int | None, cursor: Cursor | None = None) -> Iterator[Step]:
        here = Cursor(
            epoch=0, row=0, position=0, items=len(self.corpus), seed=self.seed, digest=self.digest
        )
        here = _continued(here, cursor)
        epoch, position = here["epoch"], here["position"]
        while epochs is None or epoch < epochs:
            for chosen in self.epoch(epoch)[position:]:
                position += 1
                yield (
                    [self.corpus[index] for index in chosen],
                    {**here, "epoch": epoch, "position": position},
                )
            epoch, position = epoch + 1, 0


class StreamFeed(Feed):
    """Steps over rows that are read as they are needed, again in each epoch.

    Args:
        read: examples of the rows from that one on.
        digest: identifies the rows and how they are rendered.
        examples, tokens: how much a step holds; exactly one of them.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[Example]],
        digest: str,
        *,
        examples: int | None,
        tokens: int | None,
        seed: int,
        window: int = WINDOW,
    ) -> None:
        self._read, self.seed = read, seed
        self._cut = _Cut(examples, tokens, window)
        self.digest = f"{digest}:{self._cut}:{window}"

    def total(self, epochs: int) -> None:
        return None

    def steps(self, epochs: int | None, cursor: Cursor | None = None) -> Iterator[Step]:
        here = _continued(
            Cursor(epoch=0, row=0, position=0, items=None, seed=self.seed, digest=self.digest),
            cursor,
        )
        epoch, row, position = here["epoch"], here["row"], here["position"]
        while epochs is None or epoch < epochs:
            seen = row > 0
            for first, data in self._windows(row):
                seen = True
                draw = random.Random(f"{self.seed}:{epoch}:{first}")
                order = list(range(len(data)))
                draw.shuffle(order)
                plan = self._cut(order, [len(data[index]) for index in order], draw)
                for chosen in plan[position:]:
                    position += 1
                    yield (
                        [data[index] for index in chosen],
                        {**here, "epoch": epoch, "row": first, "position": position},
                    )
                position = 0
            if not seen:
                raise DataError("the stream has no example.")
            epoch, row, position = epoch + 1, 0, 0

    def _windows(self, row: int) -> Iterator[tuple[int, list[Datum]]]:
        """Windows of examples, each with the row at which it begins; a row's examples stay together."""
        data: list[Datum] = []
        first = last = row
        for found in self._read(row):
            if len(data) >= self._cut.window and found.row != last:
                yield first, data
                data, first = [], found.row
            data.append(found.datum)
            last = found.row
        if data:
            yield first, data


class _Cut:
    """Cuts an order into steps."""

    def __init__(self, examples: int | None, tokens: int | None, window: int = WINDOW) -> None:
        if (examples is None) == (tokens is None):
            raise DataError("a step needs a number of examples or a budget of tokens.")
        if (examples or tokens or 0) < 1:
            raise DataError(f"a step needs at least one example, not {examples or tokens}.")
        self.examples, self.tokens = examples, tokens
        # A whole number of steps, so that only the last one of an epoch is smaller.
        self.window = window if examples is None else -(-window // examples) * examples

    def __str__(self) -> str:
        return f"{self.examples} examples" if self.examples else f"{self.tokens} tokens"

    def __call__(
        self, order: Sequence[int], lengths: Sequence[int], draw: random.Random
    ) -> list[list[int]]:
        if self.examples is not None:
            starts = range(0, len(order), self.examples)
            return [list(order[start : start + self.examples]) for start in starts]
        steps = [[order[place] for place in row] for row in pack(lengths, self.tokens or 0)]
        draw.shuffle(steps)
        return steps


def _continued(here: Cursor, cursor: Cursor | None) -> Cursor:
    """``cursor`` after a check, or the beginning."""
    if cursor is None:
        return here
    for name, saved, now in (
        ("number of examples", cursor["items"], here["items"]),
        ("seed", cursor["seed"], here["seed"]),
        ("content hash", cursor["digest"], here["digest"]),
    ):
        if saved != now:
            raise DataError(
                f"cannot resume: the {name} was {saved!r} when the run was saved and is {now!r} now. "
                "Resume with the same data and options, or start a new run."
            )
    return cursor
