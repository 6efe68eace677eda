"""What the verbs give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trimtab.errors import NonFiniteLossError


@dataclass(frozen=True)
class LossResult:
    """Per datum, in the order given: the weighted ``sums`` of nll (nats), the token ``weights``, and the
    weight of tokens whose best guess is the target (``hits``). ``auxiliary`` sums a method's own losses,
    by ``adapter.name``.

    ``losses`` are what was learnt from, whatever the loss; ``logprobs`` the log-probability of each token that has a
    weight, in order; ``metrics`` what the loss tells beside (`trimtab.losses`). ``errors`` says of which adapters
    (None: of the bare base) a loss was not finite, and names the examples; what the other fields say of their data is
    of no use, and gradients were added for none of them."""

    sums: Sequence[float]
    weights: Sequence[float]
    hits: Sequence[float]
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    losses: Sequence[float] = ()
    logprobs: Sequence[Sequence[float]] = ()
    metrics: Sequence[Mapping[str, float]] = ()
    errors: Mapping[str | None, NonFiniteLossError] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.sums)

    @property
    def weight(self) -> float:
        return sum(self.weights)

    @property
    def mean(self) -> float:
        """Loss per unit of token weight."""
        return self.total / self.weight if self.weight else 0.0

    @property
    def accuracy(self) -> float:
        """Weighted share of tokens guessed right."""
        return sum(self.hits) / self.weight if self.weight else 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number (from 1), the gradient's norm before clipping, and the token weight
    that it was divided by."""

    step: int
    grad_norm: float
    weight: float


def joined(parts: Sequence[LossResult]) -> LossResult:
    """The result of data that were seen in several calls."""
    auxiliary: dict[str, float] = {}
    for part in parts:
        for name, value in part.auxiliary.items():
            auxiliary[name] = auxiliary.get(name, 0.0) + value
    return LossResult(
        sums=[value for part in parts for value in part.sums],
        weights=[value for part in parts for value in part.weights],
        hits=[value for part in parts for value in part.hits],
        auxiliary=auxiliary,
        losses=[value for part in parts for value in part.losses],
        logprobs=[values for part in parts for values in part.logprobs],
        metrics=[values for part in parts for values in part.metrics],
    )


def picked(result: LossResult, numbers: Sequence[int], adapter: str) -> LossResult:
    """What a result says of an adapter, whose data are those of these numbers."""
    return LossResult(
        auxiliary={k: v for k, v in result.auxiliary.items() if k.startswith(f"{adapter}.")},
        sums=[result.sums[n] for n in numbers],
        weights=[result.weights[n] for n in numbers],
        hits=[result.hits[n] for n in numbers],
        losses=[result.losses[n] for n in numbers],
        logprobs=[result.logprobs[n] for n in numbers],
        metrics=[result.metrics[n] for n in numbers],
    )
