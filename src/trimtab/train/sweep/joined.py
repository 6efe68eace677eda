"""One step of several variants in one forward and backward.

Micro-batches hold documents of all of them, so that small steps fill them; gradients are sums and no gradient crosses
from one owner to another. Variants with another loss are computed in a call of their own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.data import Datum
from trimtab.engine import Engine, LossResult
from trimtab.errors import NonFiniteLossError
from trimtab.optim.params import CrossEntropy
from trimtab.train.stage import Computed


@dataclass(frozen=True)
class Wanted:
    """The examples of the next step of an adapter, and what it learns of them."""

    adapter: str
    members: Sequence[Datum]
    loss: CrossEntropy


Found = dict[str, Computed | NonFiniteLossError]
"""By adapter: what its step gave, or why it gave nothing."""


class Joined:
    """Computes steps together.

    Args:
        micro_tokens: the most cells of a micro-batch, unless an example is longer.
    """

    def __init__(self, engine: Engine, micro_tokens: int) -> None:
        self._engine, self._micro_tokens = engine, micro_tokens

    def compute(self, wanted: Sequence[Wanted]) -> Found:
        """The losses of each, whose gradients its adapter then holds."""
        found: Found = {}
        for loss in dict.fromkeys(one.loss for one in wanted):
            group = [one for one in wanted if one.loss == loss]
            try:
                found |= self._together(group)
            except NonFiniteLossError as error:  # all gradients of the call are dropped
                found |= {group[0].adapter: error} if len(group) == 1 else self._apart(group)
        return found

    def _together(self, group: Sequence[Wanted]) -> Mapping[str, Computed]:
        began = time.perf_counter()
        data = [datum for one in group for datum in one.members]
        owners = [one.adapter for one in group for _ in one.members]
        self._engine.micro_tokens = max(self._micro_tokens, *map(len, data))
        result = self._engine.forward_backward(data, owners, group[0].loss)
        each = (time.perf_counter() - began) / sum(map(len, data))
        found, first = {}, 0
        for one in group:
            last = first + len(one.members)
            seconds = each * sum(map(len, one.members))
            found[one.adapter] = Computed(part_of(result, one.adapter, first, last), seconds)
            first = last
        return found

    def _apart(self, group: Sequence[Wanted]) -> Found:
        """One after the other, which tells whose loss it is that is not finite."""
        found: Found = {}
        for one in group:
            try:
                found |= self._together([one])
            except NonFiniteLossError as error:
                found[one.adapter] = error
        return found


def part_of(result: LossResult, adapter: str, first: int, last: int) -> LossResult:
    """What a result says of the data from ``first`` to ``last``, which are that adapter's."""
    mine = f"{adapter}."
    return LossResult(
        result.sums[first:last],
        result.weights[first:last],
        result.hits[first:last],
        {name: value for name, value in result.auxiliary.items() if name.startswith(mine)},
    )
