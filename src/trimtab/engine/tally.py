"""What a pass has found so far: losses of each datum, and whose losses are not finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from trimtab.data import Datum
from trimtab.engine.micro import Micro, Who
from trimtab.engine.results import LossResult
from trimtab.engine.tenant import listed
from trimtab.errors import NonFiniteLossError


class Tally:
    """Of one pass over ``data``."""

    def __init__(self, data: Sequence[Datum]) -> None:
        self._data = data
        count = len(data)
        self._sums, self._weights, self._hits = ([0.0] * count for _ in range(3))
        self._auxiliary: dict[str, float] = defaultdict(float)
        self._bad: dict[Who, list[int]] = {}

    def add(self, micro: Micro, found: Sequence[Sequence[float]]) -> dict[Who, float]:
        """Sums, weights, hits and losses of the documents of a micro-batch; gives the weight of each owner."""
        of_owner: dict[Who, float] = defaultdict(float)
        each = zip(micro.members, micro.owners, *found, strict=True)
        for member, owner, total, weight, hits, loss in each:
            self._sums[member], self._weights[member], self._hits[member] = total, weight, hits
            of_owner[owner] += weight
            if not (math.isfinite(total) and math.isfinite(loss)):
                self._bad.setdefault(owner, []).append(member)
        return of_owner

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
        return LossResult(self._sums, self._weights, self._hits, dict(self._auxiliary), errors)

    def _error(self, members: Sequence[int]) -> NonFiniteLossError:
        origins = [self._data[member].origin or f"example {member}" for member in members]
        return NonFiniteLossError(
            f"the loss is not finite for {listed(origins)} No tensor was changed."
        )
