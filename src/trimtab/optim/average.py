"""An exponential moving average of an adapter's tensors, kept beside them.

After step t (from 1) it is ā ← d ā + (1 − d) a, with d = min(decay, t / (t + 9)): so that it forgets where
training began sooner than a long average would. ā begins as the tensors after the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "average::"


class Average:
    """The average of ``named``; empty until the first `update`."""

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._named = dict(named)
        self._values: dict[str, Tensor] = {}
        self._updates = 0

    @property
    def kept(self) -> list[Tensor]:
        """The averages, as they lie."""
        return list(self._values.values())

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Take the tensors of one more step into account."""
        tensors = [parameter.detach() for parameter in self._named.values()]
        if not self._values:
            self._values = {key: p.detach().clone() for key, p in self._named.items()}
        self._updates += 1
        share = 1 - min(decay, self._updates / (self._updates + 9))
        torch._foreach_lerp_([self._values[key] for key in self._named], tensors, share)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The averages in the place of the tensors, inside the ``with``; nothing changes before any update."""
        before = {key: self._named[key].detach().clone() for key in self._values}
        self._put(self._values)
        try:
            yield
        finally:
            self._put(before)

    def take(self) -> None:
        """Let the tensors be the averages from now on."""
        self._put(self._values)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            self._named[key].copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The averages and their count by name, on CPU; nothing before the first update."""
        if not self._values:
            return {}
        found = {f"{PREFIX}{key}": value.cpu().contiguous() for key, value in self._values.items()}
        return {**found, PREFIX: torch.tensor(self._updates)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave, as it was checked by the caller."""
        self._updates = int(state[PREFIX]) if PREFIX in state else 0
        self._values = {
            key: state[f"{PREFIX}{key}"].to(parameter.device).clone()
            for key, parameter in self._named.items()
            if f"{PREFIX}{key}" in state
        }
