"""What is learnt from each datum of a call: its loss, what that needs, and which data it takes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.data import Datum
from trimtab.engine.head import Kept
from trimtab.engine.micro import Micro, Who
from trimtab.errors import DataError, UnknownNameError, suggest
from trimtab.losses import CISPO, DPO, PPO, Form, ImportanceSampling, Likelihood, Loss
from trimtab.losses.loss import Reference, Terms, Tokens
from trimtab.optim.params import CrossEntropy

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Likelihood(),
    "importance_sampling": ImportanceSampling(),
    "ppo": PPO(),
    "cispo": CISPO(),
    "dpo": DPO(),
}
"""By the names that a call may give instead."""
GIVEN: Mapping[str, Callable[[Datum], tuple[float, ...]]] = {
    "logprobs": lambda datum: datum.logprobs,
    "advantages": lambda datum: datum.advantages,
}
"""What data may bring with them for a loss."""
Aim = str | CrossEntropy | Loss
"""What a call may name as a loss."""


def loss_from(aim: Aim) -> Loss:
    """The loss that is meant. Raises `UnknownNameError`."""
    if isinstance(aim, Loss):
        return aim
    if isinstance(aim, CrossEntropy):
        return Likelihood(token=Form(aim.label_smoothing, aim.z_loss))
    if aim not in LOSSES:
        raise UnknownNameError(
            f"unknown loss {aim!r}.{suggest(str(aim), LOSSES)} Known: {', '.join(LOSSES)}."
        )
    return LOSSES[aim]


@dataclass(frozen=True)
class Aims:
    """``each[i]`` is the loss of datum i; ``units`` are the numbers of data that are seen together."""

    each: tuple[Loss, ...]
    units: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, aim: Aim | Sequence[Aim], data: Sequence[Datum], owners: Sequence[Who]) -> Aims:
        """Of a call with one loss for all data, or one for each.

        Raises:
            UnknownNameError: no such loss.
            DataError: another number of losses than of data; data that lack what their loss needs, or a partner.
        """
        named = [aim] * len(data) if isinstance(aim, Aim) else list(aim)
        if len(named) != len(data):
            raise DataError(
                f"{len(named)} losses were given for {len(data)} data; give one, or one for each."
            )
        each = tuple(map(loss_from, named))
        members: dict[tuple[Loss, Who], list[int]] = {}
        for index, (loss, owner, datum) in enumerate(zip(each, owners, data, strict=True)):
            _check_given(loss, datum)
            members.setdefault((loss, owner), []).append(index)
        units: list[tuple[int, ...]] = []
        for (loss, owner), own in members.items():
            if len(own) % loss.together:
                raise DataError(
                    f"{type(loss).__name__} takes data {loss.together} at a time, one after the other, and "
                    f"{owner or 'the base'} was given {len(own)}."
                )
            units += zip(
                *(own[start :: loss.together] for start in range(loss.together)), strict=True
            )
        return cls(each, tuple(sorted(units)))

    def references(self, data: Sequence[Datum]) -> dict[int, Reference]:
        """With whom data are to be compared that bring no log-probabilities with them."""
        found = {index: loss.compared for index, loss in enumerate(self.each)}
        return {i: who for i, who in found.items() if who is not None and not data[i].logprobs}

    def counts(self, weights: Sequence[float]) -> list[float]:
        """What each datum counts in a step, from the weights of its tokens."""
        return [loss.counts(weight) for loss, weight in zip(self.each, weights, strict=True)]

    def groups(self, micro: Micro, kept: Kept, data: Sequence[Datum]) -> list[Group]:
        """The documents of a micro-batch by their loss, those of a unit one after the other."""
        places: dict[Loss, list[tuple[int, int, int]]] = {}
        for place, member in enumerate(micro.members):
            place_in = self._unit[member], member, place
            places.setdefault(self.each[member], []).append(place_in)
        found = []
        for loss, ordered in places.items():
            own = [place for _, _, place in sorted(ordered)]
            number = torch.full((len(micro.members),), -1)
            number[own] = torch.arange(len(own))
            index_K = (number[kept.document] >= 0).nonzero()[:, 0]
            laid = [
                _laid(micro, [given(data[member]) for member in micro.members])[kept.index][index_K]
                if name in loss.uses
                else torch.zeros(len(index_K))
                for name, given in GIVEN.items()
            ]
            document_K = number[kept.document[index_K]]
            found.append(
                Group(loss, torch.tensor(own), index_K, document_K, kept.weights[index_K], *laid)
            )
        return found

    @cached_property
    def _unit(self) -> dict[int, int]:
        """The number of the unit of each datum."""
        return {member: number for number, unit in enumerate(self.units) for member in unit}


@dataclass(frozen=True)
class Group:
    """D documents of a micro-batch that have one loss, and their K tokens with a weight: ``index_K`` among those of all
    documents, ``document_K`` the number of each one's document in the group."""

    loss: Loss
    places_D: Tensor
    index_K: Tensor
    document_K: Tensor
    weights_K: Tensor
    logprobs_K: Tensor
    advantages_K: Tensor

    def to(self, device: torch.device) -> Group:
        """On a device."""
        tensors = (
            self.places_D, self.index_K, self.document_K,
            self.weights_K, self.logprobs_K, self.advantages_K,
        )  # fmt: skip
        return Group(self.loss, *(tensor.to(device) for tensor in tensors))

    def terms(self, each: Tensor) -> Terms:
        """From the losses of all tokens of the micro-batch."""
        tokens = Tokens(
            each[self.index_K], self.weights_K, self.document_K, len(self.places_D),
            self.logprobs_K.to(each.dtype), self.advantages_K.to(each.dtype),
        )  # fmt: skip
        return self.loss.terms(tokens)


def forms_of(groups: Sequence[Group]) -> list[tuple[Form, Tensor]]:
    """The forms of a token's loss, and which tokens have each."""
    found: dict[Form, list[Tensor]] = {}
    for group in groups:
        found.setdefault(group.loss.form, []).append(group.index_K)
    return [(form, torch.cat(index)) for form, index in found.items()]


def losses_of(
    groups: Sequence[Group], each: Tensor, documents: int
) -> tuple[Tensor, list[dict[str, float]]]:
    """(D,) the loss of each document of a micro-batch, with its gradient; and what else is told of each."""
    losses_D = each.new_zeros(documents)
    metrics: list[dict[str, float]] = [{} for _ in range(documents)]
    for group in groups:
        terms = group.terms(each)
        losses_D = losses_D.index_add(0, group.places_D, terms.losses_D)
        if terms.metrics:
            values = torch.stack([*terms.metrics.values()]).tolist()
            for place, own in zip(group.places_D.tolist(), zip(*values, strict=True), strict=True):
                metrics[place] = dict(zip(terms.metrics, own, strict=True))
    return losses_D, metrics


def _laid(micro: Micro, given: Sequence[Sequence[float]]) -> Tensor:
    """(B·T,) what was given for the targets of each document, where it was; else 0."""
    flat = torch.zeros(micro.batch.input_ids.shape, dtype=torch.float64)
    for document, values in zip(micro.batch.documents, given, strict=True):
        if values:
            own = torch.tensor(values, dtype=torch.float64)
            flat[document.row, document.start : document.stop] = own
    return flat.flatten()


def _check_given(loss: Loss, datum: Datum) -> None:
    for name in loss.needs:
        if not GIVEN[name](datum):
            raise DataError(
                f"{datum.origin or 'an example'} has no {name}, and {type(loss).__name__} needs one for each target: "
                f"Datum.causal(ids, weights, {name}=...)."
            )
