"""Rows of x, each by a matrix of its own slot:   y_n = x_n M_s,   s the slot of row n.

A batch that mixes many adapters has a row or two for each. A row's product is then a weighted sum of the rows of its
matrix, which torch takes out of the table of all matrices where they lie (``embedding_bag``): each is read once,
nothing is gathered, and slots may come in any order. Sums are taken in fp32 and rounded once. Where many rows in
succession have one slot (prompts that are read), they are one product. The twin is a product for each such run.

Legend: N rows, S slots, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.tracing import traced

FEWEST = 8
"""Rows of a run from which on it is a product by itself."""


class Rows:
    """The slot of each row, and what is made of that once for all layers."""

    def __init__(self, slots: Sequence[int], device: torch.device | None = None) -> None:
        self.slots_N = torch.tensor(slots, device=device)
        self.runs: list[tuple[int, int]] = []
        """(slot, how many rows) in succession."""
        for slot in slots:
            if self.runs and self.runs[-1][0] == slot:
                self.runs[-1] = slot, self.runs[-1][1] + 1
            else:
                self.runs.append((slot, 1))
        self.long = len(slots) >= FEWEST * len(self.runs)
        """Whether a run has many rows."""
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def table(self, width: int) -> tuple[Tensor, Tensor]:
        """Where the ``width`` rows of each row's matrix lie in a table of all; and where those of each row begin."""
        if width not in self._tables:
            device = self.slots_N.device
            places = self.slots_N[:, None] * width + torch.arange(width, device=device)
            begins = torch.arange(0, places.numel(), width, device=device)
            self._tables[width] = places.flatten(), begins
        return self._tables[width]


def stacked_product(x_NI: Tensor, matrices_SIO: Tensor, rows: Rows) -> Tensor:
    """Each row of x by the matrix of its slot."""
    differentiated = x_NI.requires_grad and torch.is_grad_enabled()
    if rows.long or differentiated or not x_NI.is_cpu or traced():
        return stacked_product_reference(x_NI, matrices_SIO, rows)
    places, begins = rows.table(x_NI.shape[1])
    table = matrices_SIO.view(-1, matrices_SIO.shape[2])
    weights = x_NI.reshape(-1)
    y: Tensor = torch.embedding_bag(table, places, begins, False, 0, False, weights)[0]
    return y


def stacked_product_reference(x_NI: Tensor, matrices_SIO: Tensor, rows: Rows) -> Tensor:
    """The twin of `stacked_product`."""
    pieces = x_NI.split([count for _, count in rows.runs])
    made = [piece @ matrices_SIO[slot] for piece, (slot, _) in zip(pieces, rows.runs, strict=True)]
    return torch.cat(made) if made else x_NI.new_empty(0, matrices_SIO.shape[2])
