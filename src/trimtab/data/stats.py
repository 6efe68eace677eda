"""Counts that say what a data set is made of, and how much of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

from trimtab.data.batch import Batch
from trimtab.data.datum import Datum
from trimtab.errors import DataError


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Counts over documents. ``trained`` is the number of targets with a weight; ``padding`` the
    fraction of cells of the batches that were given (0 without any)."""

    documents: int
    tokens: int
    trained: int
    shortest: int
    median: float
    longest: int
    padding: float = 0.0

    @classmethod
    def of(cls, data: Sequence[Datum], batches: Sequence[Batch] = ()) -> Self:
        """Counts of ``data``, and the padding of ``batches`` made of them. `DataError` for no data."""
        if not data:
            raise DataError("there are no examples to count.")
        lengths = [len(datum) for datum in data]
        cells = sum(batch.input_ids.numel() for batch in batches)
        filled = sum(batch.tokens for batch in batches)
        return cls(
            documents=len(data),
            tokens=sum(lengths),
            trained=sum(sum(1 for weight in datum.weights if weight) for datum in data),
            shortest=min(lengths),
            median=float(median(lengths)),
            longest=max(lengths),
            padding=1.0 - filled / cells if cells else 0.0,
        )

    def __str__(self) -> str:
        text = (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.trained:,} trained "
            f"({self.trained / self.tokens:.0%}); length {self.shortest} to {self.longest}, "
            f"median {self.median:g}"
        )
        return text + (f"; {self.padding:.0%} padding" if self.padding else "")
