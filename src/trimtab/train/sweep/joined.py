"""One step of several variants in one forward and backward.

Micro-batches hold documents of all of them, each with the loss of its own variant, so that small steps fill them;
gradients are sums and no gradient crosses from one owner to another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
        began = time.perf_counter()
        data = [datum for one in wanted for datum in one.members]
        owners = [one.adapter for one in wanted for _ in one.members]
        losses = [one.loss for one in wanted for _ in one.members]
        self._engine.micro_tokens = max(self._micro_tokens, *map(len, data))
        try:
            result = self._engine.forward_backward(data, owners, losses)
        except NonFiniteLossError as error:  # all data are of one adapter
            return dict.fromkeys(owners, error)
        each = (time.perf_counter() - began) / sum(map(len, data))
        found: Found = {}
        first = 0
        for one in wanted:
            last = first + len(one.members)
            seconds = each * sum(map(len, one.members))
            found[one.adapter] = result.errors.get(one.adapter) or Computed(
                part_of(result, one.adapter, first, last), seconds
            )
            first = last
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
