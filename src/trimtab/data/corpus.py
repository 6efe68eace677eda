"""Tokenised sources as one set of examples: mixed by weight, without duplicates, split by a hash.

A source of weight w is seen w times in an epoch: 2 is each example twice, 0.5 one half of them in one epoch and
the other half in the next. Duplicates and splits go by the key of each record, a hash of its normalised text; so
they do not change with the tokenizer, the template, or rows that are added.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from trimtab.data.datum import Datum
from trimtab.data.token_file import TokenFile

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Portion:
    """The examples ``chosen`` (indices, ascending) of one source, and how often an epoch shows them."""

    file: TokenFile
    chosen: NDArray[np.int64]
    name: str
    digest: str
    weight: float = 1.0

    @property
    def keys(self) -> NDArray[np.uint64]:
        found: NDArray[np.uint64] = self.file.keys[self.chosen]
        return found

    def only(self, mask: NDArray[np.bool_]) -> Portion:
        """Those examples of this portion where ``mask`` is true."""
        return Portion(self.file, self.chosen[mask], self.name, self.digest, self.weight)

    def parted(self, fraction: float) -> tuple[Portion, Portion]:
        """(the rest, about ``fraction`` of them): each example falls by its own key alone."""
        held = self.keys < np.uint64(int(fraction * 2**64))
        return self.only(~held), self.only(held)

    def visits(self, epoch: int, seed: int) -> array[int]:
        """Places in ``chosen`` that this epoch shows, each as often as it is shown."""
        count = len(self.chosen)
        whole, part = int(self.weight), self.weight % 1
        found = array("q", [*range(count)] * whole)
        if share := min(max(round(part * count), 1), count) if part and count else 0:
            order = shuffled(count, f"{seed}:{self.digest}")
            start = epoch * share
            found.extend(order[place % count] for place in range(start, start + share))
        return found


class Corpus(Sequence[Datum]):
    """The portions one after another, as one sequence of examples."""

    def __init__(self, portions: Sequence[Portion]) -> None:
        self.portions = tuple(portions)
        self._starts = [0]
        for portion in self.portions:
            self._starts.append(self._starts[-1] + len(portion.chosen))
        self.lengths: NDArray[np.int64] = _joined(
            [p.file.lengths[p.chosen] for p in self.portions], np.dtype(np.int64)
        )
        self.trained: NDArray[np.int64] = _joined(
            [p.file.trained[p.chosen].astype(np.int64) for p in self.portions], np.dtype(np.int64)
        )
        self.keys: NDArray[np.uint64] = _joined(
            [portion.keys for portion in self.portions], np.dtype(np.uint64)
        )

    @property
    def digest(self) -> str:
        """Of all that the examples are made of, and how they are mixed."""
        content = hashlib.sha256()
        for portion in self.portions:
            content.update(f"{portion.digest}:{portion.weight!r}:".encode())
            content.update(portion.chosen.astype("<i8").tobytes())
        return content.hexdigest()

    def order(self, epoch: int, seed: int) -> array[int]:
        """What an epoch visits, in its order; the same on every machine and in every process."""
        found = array("q")
        for start, portion in zip(self._starts, self.portions, strict=False):
            found.extend(start + place for place in portion.visits(epoch, seed))
        random.Random(f"{seed}:{epoch}").shuffle(found)
        return found

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Datum: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Datum]: ...
    def __getitem__(self, index: int | slice) -> Datum | Sequence[Datum]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        for portion, (start, stop) in zip(self.portions, pairwise(self._starts), strict=True):
            if place < stop:
                return portion.file[int(portion.chosen[place - start])]
        raise AssertionError("a place below the length lies in some portion")


def distinct(portions: Sequence[Portion]) -> tuple[list[Portion], int]:
    """The portions without examples whose key came before; and how many those were."""
    keys = _joined([portion.keys for portion in portions], np.dtype(np.uint64))
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    kept, start = [], 0
    for portion in portions:
        kept.append(portion.only(first[start : start + len(portion.chosen)]))
        start += len(portion.chosen)
    return kept, len(keys) - int(first.sum())


def without(portions: Sequence[Portion], keys: NDArray[np.uint64]) -> tuple[list[Portion], int]:
    """The portions without examples that have one of ``keys``; and how many those were."""
    masks = [np.isin(portion.keys, keys) for portion in portions]
    kept = [portion.only(~mask) for portion, mask in zip(portions, masks, strict=True)]
    return kept, sum(int(mask.sum()) for mask in masks)


def shuffled(count: int, seed: str) -> array[int]:
    """A permutation; the same on every machine and in every process."""
    order = array("q", range(count))
    random.Random(seed).shuffle(order)
    return order


def _joined(arrays: Sequence[NDArray[T]], kind: np.dtype[T]) -> NDArray[T]:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)
