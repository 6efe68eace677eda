"""Copies of adapters to answer with: whether a model takes them, and in which form they wait.

A serving copy holds in the base's dtype what hooks cast to it (`Spec.cast`), so that it answers as its masters would;
all else keeps its own. Whether an adapter fits a model is seen from its form alone, so it is looked into once a form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.attach import prepared
from trimtab.adapt.files import disk_key
from trimtab.adapt.known import Known
from trimtab.adapt.packed import Along, Form, Packed
from trimtab.adapt.plan import layer_at, resolved
from trimtab.adapt.tensors import Specs
from trimtab.adapt.tree import anatomy_of
from trimtab.models.anatomy import Anatomy


class Fit(NamedTuple):
    """What is known of a form on one model: the form of its serving copies, and the keys of their tensors on disk."""

    form: Form
    keys: tuple[str, ...]


class Forms:
    """The forms of adapters for one model, each kept once.

    The first adapter of a form is checked as attaching it would check it; others of the form differ in values alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known = Known()
        self._kept: dict[Form, Form] = {}
        self._fits: dict[Form, Fit] = {}

    def serving(self, adapter: Adapter) -> Packed:
        """A copy to answer with. Its provenance stays where the adapter came from.

        Raises:
            AttachError, TargetError, UnsupportedError: it cannot be attached to this model.
        """
        if adapter.origin.rebuilt:  # its file left tensors out that its base makes again
            adapter, form = self._prepared(adapter)
        else:
            form = self.fit(adapter).form
        named = adapter.named()
        return Packed(form, form.layout.pack(named[name] for name in form.names))

    def whole(self, adapter: Adapter, along: Along | None) -> Packed:
        """The adapter as it is, bit for bit."""
        form = self._once(Form.of(adapter))
        piece = form.layout.pack(adapter.named().values())
        return Packed(form, piece, adapter.origin.provenance, along)

    def fit(self, adapter: Adapter) -> Fit:
        """What is known of an adapter's form; found out where it is the first of it. Raises as `serving`."""
        given = Form.of(adapter)
        if given not in self._fits:
            ready, form = self._prepared(adapter)
            keys = tuple(disk_key(ready, name) for name in form.names)
            self._fits[given] = Fit(form, keys)
        return self._fits[given]

    def _prepared(self, adapter: Adapter) -> tuple[Adapter, Form]:
        """An adapter as it would be attached, and the form of its serving copy."""
        anatomy = anatomy_of(self._model)
        base = self._known.fingerprint(anatomy)
        ready = resolved(adapter, adapter.name, anatomy, base)
        specs, made = prepared(self._model, ready, anatomy, new=False)
        kinds = {
            TensorName(path, spec.name): spec
            for (_, path), found in specs.items()
            for spec in found.values()
        }
        stored = {name: tensor for name, tensor in made.items() if kinds[name].stored}
        whole = Adapter(
            ready.name, ready.method, ready.sites, stored, base=ready.base, origin=ready.origin
        )
        whole.drawn = ready.drawn
        return whole, self._once(Form.of(whole, narrow(whole, anatomy, specs)))

    def _once(self, form: Form) -> Form:
        return self._kept.setdefault(form, form)


def narrow(adapter: Adapter, anatomy: Anatomy, specs: Specs) -> Mapping[TensorName, torch.dtype]:
    """The dtypes of those tensors that hooks see in the dtype of the frozen layer alone.

    What a method makes something of first (`Method.ready`) is read as it is, and so stays as it is.
    """
    found: dict[TensorName, torch.dtype] = {}
    first = layer_at(anatomy, adapter.sites[0].path).dtype
    for (number, path), of_site in specs.items():
        made = number < 0 and adapter.methods[-1 - number].readies
        dtype = layer_at(anatomy, path).dtype if path else first
        for spec in () if made else of_site.values():
            if spec.cast and spec.stored:
                found[TensorName(path, spec.name)] = dtype
    return found
