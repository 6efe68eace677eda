"""What a pass has found so far: losses of each datum, and whose losses are not finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.data import Datum
from trimtab.engine.aims import Aims
from trimtab.engine.head import Kept
from trimtab.engine.micro import Micro, Who
from trimtab.engine.results import LossResult
from trimtab.engine.tenant import listed
from trimtab.errors import NonFiniteLossError


class Tally:
    """Of one pass over ``data``."""

    def __init__(self, data: Sequence[Datum], aims: Aims) -> None:
        self._data, self._aims = data, aims
        count = len(data)
        self._sums, self._weights, self._hits, self._losses = ([0.0] * count for _ in range(4))
        self._logprobs: list[Sequence[float]] = [()] * count
        self._metrics: list[Mapping[str, float]] = [{} for _ in data]
        self._auxiliary: dict[str, float] = defaultdict(float)
        self._bad: dict[Who, list[int]] = {}

    def add(
        self,
        micro: Micro,
        kept: Kept,
        nll_K: Tensor,
        found: Sequence[Sequence[float]],
        metrics: Sequence[Mapping[str, float]],
    ) -> Mapping[Who, float]:
        """What was found of the documents of a micro-batch: sums, weights, hits and losses, and metrics; gives what the
        data of each owner count."""
        counts: dict[Who, float] = defaultdict(float)
        each = zip(micro.members, micro.owners, metrics, *found, strict=True)
        for member, owner, told, total, weight, hits, loss in each:
            self._sums[member], self._weights[member], self._hits[member] = total, weight, hits
            self._losses[member], self._metrics[member] = loss, told
            counts[owner] += self._aims.each[member].counts(weight)
            if not (math.isfinite(total) and math.isfinite(loss)):
                self._bad.setdefault(owner, []).append(member)
        sizes = torch.bincount(kept.document.cpu(), minlength=len(micro.members)).tolist()
        split = nll_K.cpu().neg().split(sizes)
        for member, own in zip(micro.members, split, strict=True):
            self._logprobs[member] = own.tolist()
        return counts

    def add_auxiliary(self, micro: Micro, adapter: str, name: str, value: float) -> None:
        """A loss of an adapter's own, of the forward of a micro-batch."""
        self._auxiliary[f"{adapter}.{name}"] += value
        if not math.isfinite(value) and adapter not in self._bad:
            own = zip(micro.members, micro.owners, strict=True)
            self._bad[adapter] = [member for member, owner in own if owner == adapter]

    def healthy(self, owner: Who) -> bool:
        """Whether all losses of an adapter's data, so far, are finite."""
        return owner not in self._bad

    def result(self) -> LossResult:
        """All of it."""
        errors = {owner: self._error(members) for owner, members in self._bad.items()}
        return LossResult(
            self._sums, self._weights, self._hits, dict(self._auxiliary),
            self._losses, self._logprobs, self._metrics, errors,
        )  # fmt: skip

    def _error(self, members: Sequence[int]) -> NonFiniteLossError:
        origins = [self._data[member].origin or f"example {member}" for member in members]
        return NonFiniteLossError(
            f"the loss is not finite for {listed(origins)} No tensor was changed."
        )
