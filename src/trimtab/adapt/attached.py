"""Adapters that act by being attached to a model: what any method can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import nn

from trimtab.adapt.active import Active
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.fit import Forms
from trimtab.adapt.packed import Along, Packed
from trimtab.adapt.tree import sites_of
from trimtab.frozen import stamp


@final
class Attached(Active):
    """The adapters attached to a model, by the names that scopes and rows say.

    One with something along is attached to be trained; what a model says of one besides (`Standing`) is kept until it
    comes up again. Where no scope is open, that one acts last.
    """

    def __init__(self, model: nn.Module, forms: Forms) -> None:
        self.model = model
        self._forms = forms
        self._standings: dict[str, Standing] = {}
        self._came: dict[str, object] = {}
        """Of those that came up to answer alone: the state of their tensors then."""

    def up(self, name: str, packed: Packed) -> None:
        trained = packed.along is not None
        with torch.inference_mode(False):
            attach(self.model, packed.adapter(name), trainable=trained)
        if not trained:
            self._came[name] = self._state(name)
        if name in self._standings:
            self._standings.pop(name).take(self.model, name)

    def down(self, name: str) -> Packed | None:
        standing = Standing.of(self.model, name)
        unchanged = self._came.pop(name, None) == self._state(name)
        learns = any(parameter.requires_grad for parameter in self.adapter(name).parameters())
        if learns:
            standing = replace(standing, still=_still(self.adapter(name)))
        if standing != ORDINARY:
            self._standings[name] = standing
        adapter = detach(self.model, name)
        if unchanged:
            return None
        return self._forms.whole(adapter, Along.of({}, {}) if learns else None)

    def forget(self, name: str) -> None:
        self._standings.pop(name, None)

    def has(self, name: str) -> bool:
        bank = find_bank(self.model)
        return bank is not None and name in bank.adapters

    def plain(self, name: str) -> bool:
        return name not in self._standings

    def cost(self, packed: Packed) -> int:
        return packed.nbytes + packed.form.layout.widened

    def size(self, name: str) -> int:
        return self.adapter(name).nbytes

    def _state(self, name: str) -> object:
        """Another one once somebody wrote into a tensor, or let it learn."""
        tensors = self.adapter(name).named().values()
        return stamp(tensors), [tensor.requires_grad for tensor in tensors]

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, which is up."""
        return bank_of(self.model).require(name)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a model says of an attached adapter, which detaching it forgets."""

    scale: float = 1.0
    disabled: bool = False
    dropped: int = 0
    scales: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """Of single edits, by path and number there, where they are not 1."""
    still: frozenset[str] = frozenset()
    """Keys of parameters that are not to learn, of an adapter that is."""

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Standing:
        """What is said now."""
        bank = bank_of(model)
        scales = {
            (site.path, number): edit.scale
            for site in sites_of(model).values()
            for number, edit in enumerate(site.edits.get(name, ()))
            if edit.scale != 1.0
        }
        return cls(
            bank.scales.get(name, 1.0), name in bank.disabled, bank.dropped.get(name, 0), scales
        )

    def take(self, model: nn.Module, name: str) -> None:
        """Say it again."""
        bank, sites = bank_of(model), sites_of(model)
        bank.scales[name], bank.dropped[name] = self.scale, self.dropped
        if self.disabled:
            bank.disabled.add(name)
        for (path, number), scale in self.scales.items():
            sites[path].edits[name][number].scale = scale
        for key, tensor in bank.require(name).tensors.items() if self.still else ():
            if key in self.still:
                tensor.requires_grad_(False)


ORDINARY = Standing()


def _still(adapter: Adapter) -> frozenset[str]:
    named = adapter.tensors.items()
    return frozenset(k for k, t in named if isinstance(t, nn.Parameter) and not t.requires_grad)
