"""One pass over data: micro-batch by micro-batch through the model, to the loss, and back.

In training each adapter draws from a generator of its own (`Tenant.generator`), one seed for each forward, so that
beside others it draws what it would draw alone, as long as its data are laid out alike: masks are drawn for the cells
of a micro-batch, so that rows padded to another width, or data divided into other micro-batches, get others. A base's
own dropout (GPT-2, BERT) is drawn for all rows of a forward at once, from the seed of the first owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.adapt.bank import Plan, bank_of, find_bank
from trimtab.adapt.context import NO_SEEDS
from trimtab.adapt.documents import apart
from trimtab.adapt.lean import Lean
from trimtab.adapt.route import Route
from trimtab.data import Batch, Datum
from trimtab.engine import limits
from trimtab.engine.aims import Aim, Aims, Group, forms_of, losses_of
from trimtab.engine.class_head import ClassHead
from trimtab.engine.frozen import Frozen
from trimtab.engine.head import Head, Kept
from trimtab.engine.micro import Layout, Micro, Who, check_fit
from trimtab.engine.results import LossResult
from trimtab.engine.rooms import Rooms
from trimtab.engine.saving import saving
from trimtab.engine.tally import Tally
from trimtab.errors import DataError
from trimtab.losses import TokenLoss
from trimtab.optim.params import Memory

BY_OWNER = ("cpu", "meta")
"""Where attention is done owner by owner (`trimtab.adapt.attend`)."""


@final
@dataclass(frozen=True)
class Pass:
    """How data are shown to one model; `Engine` says what the fields are."""

    model: PreTrainedModel
    head: Head
    layout: Layout
    memory: Memory
    rooms: Rooms
    frozen: Frozen | None
    micro_tokens: int
    packed: bool | None
    generators: Mapping[str, torch.Generator]

    def aims(self, data: Sequence[Datum], owners: Sequence[Who], aim: Aim | Sequence[Aim]) -> Aims:
        """What is to be learnt from ``data``. Raises `DataError` for what cannot be."""
        if not data:
            raise DataError("there are no examples to compute a loss of.")
        aims = Aims.of(aim, data, owners)
        limits.check(self.model, self.head, data, owners)
        for reference in aims.references(data).values():
            if reference.adapter is not None:
                bank_of(self.model).require(reference.adapter)
        check_fit(data, aims.units, self.micro_tokens)
        return aims

    def run(
        self, data: Sequence[Datum], owners: Sequence[Who], aims: Aims, *, train: bool
    ) -> LossResult:
        """The losses of ``data``; with their gradients, to ``train``.

        Raises:
            NonFiniteLossError: where all data have one owner.
        """
        result = self._through(self._compared(data, aims), owners, aims, train=train)
        if len(set(owners)) == 1:
            for error in result.errors.values():
                raise error
        return result

    def classes(
        self, head: ClassHead, data: Sequence[Datum], owners: Sequence[Who]
    ) -> list[list[float]]:
        """The probability of each class for each datum."""
        limits.check(self.model, head, data, owners)
        found: dict[int, list[float]] = {}
        budget = max(self.micro_tokens, *map(len, data)) if data else 0
        with mode(self.model, train=False), torch.no_grad():
            for micro in self.layout.plan(data, owners, budget, False) if data else ():
                batch = micro.batch.to(self.model.device)
                with self._shown(micro, batch, data):
                    shares = head.logits(micro.inputs(batch)).double().softmax(-1)
                found |= zip(micro.members, shares.tolist(), strict=True)
        return [found[number] for number in range(len(data))]

    def _compared(self, data: Sequence[Datum], aims: Aims) -> Sequence[Datum]:
        """The data with the log-probabilities of those with whom their losses compare."""
        references = aims.references(data)
        if not references:
            return data
        chosen = [data[index] for index in references]
        owners = [reference.adapter for reference in references.values()]
        plain = self.aims(chosen, owners, "cross_entropy")
        found = self._through(chosen, owners, plain, train=False).logprobs
        whole = list(data)
        for index, logprobs in zip(references, found, strict=True):
            whole[index] = data[index].with_logprobs(logprobs)
        return whole

    def _through(
        self, data: Sequence[Datum], owners: Sequence[Who], aims: Aims, *, train: bool
    ) -> LossResult:
        """All data through the model.

        Once a loss of an adapter's is not finite, no more is computed for it alone; others share no sum with it, and
        get the gradients that they would get without.
        """
        tally = Tally(data, aims)
        micros = self.micro_batches(data, owners, aims.units)
        with mode(self.model, train=train), Lean(self.model), torch.set_grad_enabled(train):
            for micro in self.rooms.each("data", micros):
                if not any(map(tally.healthy, micro.owners)):
                    continue
                seeds = self._seeds(micro) if train else NO_SEEDS
                with saving(self.model, self.memory) if train else nullcontext():
                    objective = self._forward(micro, data, aims, tally, seeds)
                if train and objective is not None:
                    with self.rooms.backward(objective):
                        objective.backward()
        return tally.result()

    def micro_batches(
        self,
        data: Sequence[Datum],
        owners: Sequence[Who],
        units: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Micro]:
        """How ``data`` are laid out. Owners share packed rows where no mask is needed for that: attention in which some
        have tokens of their own is done for each by itself on a CPU alone."""
        names = {owner for owner in owners if owner is not None}
        masked = (
            self.model.device.type not in BY_OWNER
            and len(set(owners)) > 1
            and any(
                m.virtual_tokens or m.prompt_tokens or m.overrides("beside")
                for name in names
                for m in bank_of(self.model).require(name).methods
            )
        )
        packed = False if masked else self.packed
        return self.layout.plan(data, owners, self.micro_tokens, packed, units)

    def _seeds(self, micro: Micro) -> dict[str, int]:
        """What the random numbers of each adapter begin from in a forward, by its own generator."""
        names = [owner for owner in dict.fromkeys(micro.owners) if owner is not None]
        return {n: int(torch.randint(1 << 62, (), generator=self.generators[n])) for n in names}

    def _forward(
        self,
        micro: Micro,
        data: Sequence[Datum],
        aims: Aims,
        tally: Tally,
        seeds: Mapping[str, int],
    ) -> Tensor | None:
        """The objective of one micro-batch: of the documents whose owners' losses are finite."""
        with self.rooms.inside("data"):
            kept = Kept.of(micro.batch)
            if not len(kept.index):
                return None
            groups = aims.groups(micro, kept, data)
            batch, kept, groups = self._placed(micro, kept, groups)
        with self._shown(micro, batch, data, seeds) as route, self.rooms.inside("head"):
            forms = forms_of(groups)
            token = self.head.loss(micro.inputs(batch), kept, forms, together=route.every)
            bank = find_bank(self.model)
            extras = [] if bank is None else bank.take_losses()
            losses_D, metrics = losses_of(groups, token.each, len(micro.members))
        counts = tally.add(micro, kept, token.nll, _summed(token, kept, losses_D), metrics)
        for adapter, name, value in extras:
            tally.add_auxiliary(micro, adapter, name, float(value.detach()) * counts[adapter])
        healthy = [n for n, owner in enumerate(micro.owners) if tally.healthy(owner)]
        if not healthy:
            return None
        objective = (losses_D if len(healthy) == len(losses_D) else losses_D[healthy]).sum()
        for adapter, _, value in extras:
            if tally.healthy(adapter):
                objective = objective + value * counts[adapter]
        return objective

    @contextmanager
    def _shown(
        self,
        micro: Micro,
        batch: Batch,
        data: Sequence[Datum],
        seeds: Mapping[str, int] = NO_SEEDS,
    ) -> Iterator[Route]:
        """Route a forward of ``micro``, whose ``batch`` lies on the model's device."""
        route = micro.route(per_document=self._gated(micro.owners))
        prompt = micro.prompt.to(self.model.device)
        plan = Plan(mask=batch.attention_mask, prompt=prompt, seeds=seeds)
        begins = nullcontext() if self.frozen is None else self.frozen.around(micro, route, data)
        draws = _drawing(next(iter(seeds.values()), None), self.model.device)
        with scope(self.model, route, plan), apart(micro.apart), begins, draws:
            yield route

    def _gated(self, owners: Sequence[Who]) -> bool:
        """Whether some acting method must tell documents apart."""
        bank = find_bank(self.model)
        names = {name for name in owners if name is not None}
        return bank is not None and any(
            m.needs_prompt for n in names for m in bank.require(n).methods
        )

    def _placed(
        self, micro: Micro, kept: Kept, groups: list[Group]
    ) -> tuple[Batch, Kept, list[Group]]:
        device = self.model.device
        if device.type == "cpu":
            return micro.batch, kept, groups
        moved = Kept(
            *(t.to(device) for t in (kept.index, kept.document, kept.targets, kept.weights))
        )
        return micro.batch.to(device), moved, [group.to(device) for group in groups]


def _summed(token: TokenLoss, kept: Kept, losses_D: Tensor) -> list[list[float]]:
    """For each document the sum of nll, the weights, the weight of hits, and its loss."""
    weights = kept.weights.double()
    per_token = torch.stack([token.nll.double() * weights, weights, token.best.double() * weights])
    zeros = torch.zeros(3, len(losses_D), dtype=torch.float64, device=per_token.device)
    summed = zeros.index_add(1, kept.document, per_token)
    found: list[list[float]] = torch.cat([summed, losses_D.detach().double()[None]]).tolist()
    return found


@contextmanager
def _drawing(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch's own generators, from which a base draws its own dropout, begin from ``seed``, if there is one;
    then they are as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


@contextmanager
def mode(model: PreTrainedModel, *, train: bool) -> Iterator[None]:
    """Inside, the model is in training mode or not; then as it was."""
    before = model.training
    if before != train:
        model.train(train)
    try:
        yield
    finally:
        if before != train:
            model.train(before)


def scope(
    model: PreTrainedModel, route: Route, plan: Plan | None = None
) -> AbstractContextManager[None]:
    """Route forwards of a model inside, where it has adapters."""
    bank = find_bank(model)
    return nullcontext() if bank is None else bank.scope(route, plan)
