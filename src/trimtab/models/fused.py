"""Which output rows of a fused projection are queries, keys and values.

Some families project all three with one layer. Its rows lie in G groups, each with Q rows of queries, then K
of keys, then K of values (D is the width of a head, H and N the numbers of query and key heads):

    stacked    G = 1, Q = H D, K = N D          GPT-2, phi3
    grouped    G = N, Q = H D / N, K = D        Falcon, BLOOM, GPT-NeoX: so for each key head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.errors import FileFormatError


class FusedRows(NamedTuple):
    """Indices of the output rows of a fused projection."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Fused:
    """``groups`` times ``queries`` rows, then ``keys`` rows, then as many of values."""

    groups: int
    queries: int
    keys: int

    @property
    def outputs(self) -> int:
        """How many rows there are."""
        return self.groups * (self.queries + 2 * self.keys)

    @property
    def rows(self) -> FusedRows:
        """The rows of each, in order."""
        grouped = torch.arange(self.outputs).view(self.groups, -1)
        parts = grouped.split((self.queries, self.keys, self.keys), dim=1)
        return FusedRows(*(part.flatten() for part in parts))

    @property
    def keys_values(self) -> int:
        """How many rows are keys or values."""
        return 2 * self.groups * self.keys

    def widened(self, values: Tensor, fill: float) -> Tensor:
        """A vector over keys and values -> over all rows, with ``fill`` for the queries."""
        inner = values.view(self.groups, 2 * self.keys)
        return torch.cat([inner.new_full((self.groups, self.queries), fill), inner], 1).flatten()

    def __str__(self) -> str:
        return f"{self.groups}x{self.queries}+{self.keys}"

    @classmethod
    def parse(cls, text: str) -> Fused:
        """What ``str`` wrote."""
        groups, _, rest = text.partition("x")
        queries, _, keys = rest.partition("+")
        if not (groups.isdigit() and queries.isdigit() and keys.isdigit()):
            raise FileFormatError(
                f"{text!r} does not say how the rows of a fused projection lie, as in '1x64+32'."
            )
        return cls(int(groups), int(queries), int(keys))
