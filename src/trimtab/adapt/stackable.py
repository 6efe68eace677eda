"""What an adapter adds to the layers of a model, where that is all it does: such adapters can lie in slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, SiteSpec
from trimtab.adapt.attach import existing_bank
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.plan import check_whole, layer_at, other_base, placed
from trimtab.adapt.tree import sites_of
from trimtab.errors import AttachError, BaseMismatchError, UnsupportedError
from trimtab.kernels.lowrank import Change
from trimtab.models.anatomy import Anatomy

INSTEAD = "Attach it, and route rows to it by its name."


class Stackable:
    """Reads adapters for one model, of which it knows the anatomy and the fingerprint."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._model = model
        self._anatomy = anatomy
        self._base = fingerprint(model, anatomy.modules)

    def changes(self, adapter: Adapter) -> dict[str, Change]:
        """By path, what it adds; for one that is attached, as it acts there now.

        Raises:
            UnsupportedError: it does more than to add a product of two factors at linear layers.
            AttachError: its base is another, or it does not fit this one.
        """
        given = self._fitting(adapter)
        if len(given.methods) > 1:
            raise UnsupportedError(
                f"adapter {adapter.name!r} is of several methods, and only one of plain low-rank factors can lie in a "
                f"slot. {INSTEAD}"
            )
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in given.named().items():
            tensors.setdefault(name.path, {})[name.slot] = tensor.detach()
        scales = self._scales(adapter)
        found = {}
        for site in given.sites:
            change = self._change(given, site, tensors)
            found[site.path] = replace(change, scale=change.scale * scales.get(site.path, 1.0))
        return found

    def _fitting(self, adapter: Adapter) -> Adapter:
        """The adapter as it is meant on this base."""
        if adapter.base is None:
            found = placed(adapter.detached(), self._anatomy)
            check_whole(found, self._anatomy)
            return found
        if reason := other_base(adapter, self._base):
            raise BaseMismatchError(
                f"adapter {adapter.name!r} was made for another base: {reason}."
            )
        return adapter

    def _change(
        self, adapter: Adapter, site: SiteSpec, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> Change:
        method, layer = adapter.methods[0].at(site.path), layer_at(self._anatomy, site.path)
        own = tensors.get(site.path, {})
        p = {method.names[slot]: t for slot, t in own.items() if slot in method.names}
        linear = site.path in self._anatomy.modules and layer.kind == "linear"
        change = method.stacks(p, site.role) if linear and len(p) == len(own) else None
        if change is None:
            raise UnsupportedError(
                f"adapter {adapter.name!r}: what {method.kind} does at {site.path!r} is not just to add a product of "
                f"two factors to a linear layer, so it cannot lie in a slot. {INSTEAD}"
            )
        width, height = change.a_RI.shape[1], change.b_OR.shape[0]
        if (width, height) != (layer.in_features, layer.out_features):
            raise AttachError(
                f"adapter {adapter.name!r}: its factors at {site.path!r} are of a layer of {width} inputs and {height} "
                f"outputs, and this one has {layer.in_features} and {layer.out_features}."
            )
        return change

    def _scales(self, adapter: Adapter) -> dict[str, float]:
        """How far an adapter goes at each place, where that is not all the way: only one that is attached is told."""
        bank = existing_bank(self._model)
        if bank is None or bank.adapters.get(adapter.name) is not adapter:
            return {}
        whole, dropped = bank.scales.get(adapter.name, 1.0), bank.dropped.get(adapter.name, 0)
        found = {}
        for path, site in sites_of(self._model).items():
            for edit in site.edits.get(adapter.name, ()):
                left_out = edit.block is not None and edit.block < dropped
                found[path] = 0.0 if left_out else whole * edit.scale
        return found
