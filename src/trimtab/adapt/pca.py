"""Incremental principal components (Ross et al. 2008): what EVA sees of a layer's inputs, batch by batch.

Kept between batches are the mean and the variance of each of I features and the K leading directions, so the
memory is (K + 2) · I values for each distinct input, and a batch of N rows adds a matrix of (K + N + 1) · I for a
moment. The components are of the inputs around their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.adapt.decompose import leading


class Components:
    """The ``size`` leading directions of all rows seen so far; ``alike`` is their cosine from step to step."""

    def __init__(self, size: int, alike: float) -> None:
        self.size = size
        self.alike = alike
        self.count = 0
        self.settled = False
        self.directions = torch.empty(0)
        self._singular = torch.empty(0)
        self._mean = torch.empty(0)
        self._squares = torch.empty(0)
        self._generator = torch.Generator().manual_seed(0)

    def found(self) -> dict[str, Tensor]:
        """What `trimtab.adapt.observed` calls its values."""
        count = torch.tensor(self.count)
        return {"directions": self.directions, "shares": self.shares, "count": count}

    @property
    def shares(self) -> Tensor:
        """The share of the whole variance that each direction explains."""
        return self._singular.square() / self._squares.sum().clamp_min(1e-30)

    def see(self, x_NI: Tensor) -> None:
        """Take in the rows of a batch."""
        if not x_NI.shape[0]:
            return
        x = x_NI.detach().to(torch.promote_types(x_NI.dtype, torch.float32))
        mean, seen, new = x.mean(0), self.count, x.shape[0]
        rows = x - mean
        squares = rows.square().sum(0)
        if seen:
            apart, total = mean - self._mean, seen + new
            shift = apart * (seen * new / total) ** 0.5
            rows = torch.cat([self._singular[:, None] * self.directions, rows, shift[None]])
            squares = self._squares + squares + shift.square()
            mean = self._mean + apart * (new / total)
        before = self.directions
        _, s, v = leading(rows, self._width(rows), 4, self._generator)
        self._singular, self.directions = s[: self.size], v[: self.size]
        self._mean, self._squares, self.count = mean, squares, seen + new
        if seen and before.shape == self.directions.shape:
            cosines = (before * self.directions).sum(1).abs()
            self.settled = before.shape[0] == self.size and bool((cosines >= self.alike).all())

    def _width(self, rows: Tensor) -> int:
        return min(2 * self.size, *rows.shape)


class Covariances:
    """The mean over batches of Xᵀ X, each X being divided by its largest value: I² values for each distinct input."""

    settled = False

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.empty(0)

    def see(self, x_NI: Tensor) -> None:
        """Take in the rows of a batch."""
        if not x_NI.shape[0]:
            return
        x = x_NI.detach().to(torch.promote_types(x_NI.dtype, torch.float32))
        x = x / x.max().abs()
        new = x.T @ x
        self._sum, self.count = new if not self.count else self._sum + new, self.count + 1

    def found(self) -> dict[str, Tensor]:
        """What `trimtab.adapt.observed` calls its values."""
        return {"covariance": self._sum / self.count, "count": torch.tensor(self.count)}
