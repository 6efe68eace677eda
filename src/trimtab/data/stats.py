"""Counts that say what a data set is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trimtab.data.corpus import Corpus
from trimtab.data.datum import Datum
from trimtab.errors import DataError

BINS = 12


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Counts over documents. ``trained`` is the number of targets with a weight; ``lengths`` are in tokens;
    ``bins`` are (from, to, documents) of a histogram, ends included."""

    documents: int
    tokens: int
    trained: int
    shortest: int
    median: float
    p95: float
    longest: int
    bins: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, data: Sequence[Datum]) -> Self:
        """Counts of ``data``. Raises `DataError` for none."""
        if not len(data):
            raise DataError("there are no examples to count.")
        if isinstance(data, Corpus):
            lengths, trained = data.lengths, int(data.trained.sum())
        else:
            lengths = np.array([len(datum) for datum in data], np.int64)
            trained = sum(sum(1 for weight in datum.weights if weight) for datum in data)
        return cls(
            documents=len(data),
            tokens=int(lengths.sum()),
            trained=trained,
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            p95=float(np.percentile(lengths, 95)),
            longest=int(lengths.max()),
            bins=_bins(lengths),
        )

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.trained:,} trained "
            f"({self.trained / self.tokens:.0%}); length {self.shortest} to {self.longest}, "
            f"median {self.median:g}, 95 % up to {self.p95:g}"
        )


def _bins(lengths: NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    """Equal bins of whole numbers from the shortest to the longest."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    return tuple(
        (low + number * width, min(low + (number + 1) * width - 1, high), int(count))
        for number, count in enumerate(counts)
    )
