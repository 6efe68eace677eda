"""The form of an adapter that is shared: what only training needed is gone, the edit is the same.

A LoRA that began away from zero becomes a plain one of twice the rank, a prefix or a prompt leaves its encoder
behind, masks become bits. PEFT and servers read this form wherever they know the method.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.bank import bank_of
from trimtab.adapt.plan import layer_at, planned
from trimtab.adapt.tensors import specs_of
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import UnsupportedError


def exported(adapter: Adapter, *, name: str | None = None) -> Adapter:
    """An independent adapter with the same edits, of the simplest methods that have them."""
    adapter.check_whole("export")
    copy = adapter.detached(name=name)
    if adapter.method.plain() == adapter.method:
        return copy
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    for tensor_name, number in copy.owners.items():
        parts.setdefault((tensor_name.path, number), {})[tensor_name.slot] = copy.named()[
            tensor_name
        ]
    members = [
        method.plain_for({path: slots for (path, number), slots in parts.items() if number == own})
        for own, method in enumerate(adapter.method.members)
    ]
    plain = adapter.method.remade(members).replace(train=adapter.method.train)
    tensors: dict[TensorName, Tensor] = {}
    for (path, number), slots in parts.items():
        method = copy.methods[number].at(path) if path else copy.methods[number]
        place = next((p for p in copy.places(number) if p.path == path), None) if path else None
        new = method.plain_tensors(slots, place)
        tensors |= {TensorName(path, slot): tensor for slot, tensor in new.items()}
    in_peft = copy.origin.in_peft or bool(copy.origin.plain_in_peft)
    origin = replace(copy.origin, in_peft=in_peft, plain_in_peft=None)
    return Adapter(copy.name, plain, copy.sites, tensors, base=copy.base, origin=origin)


def settled(model: nn.Module, name: str, *, to: str | None = None) -> Adapter:
    """An attached adapter without gates that look at examples: what they chose most, for every example.

    SpotTune becomes its inner method in the blocks that examples use most, which merges and is shared as that
    method is. The adapter stays as it is; the new one is called ``to`` (by default alike) and attached to nothing.

    Raises:
        UnsupportedError: the adapter's method has no such gates.
    """
    adapter = bank_of(model).require(name)
    named = adapter.named()
    names = {slot: short for method in adapter.methods for slot, short in method.names.items()}
    shared = {names[n.slot]: t for n, t in named.items() if not n.path and n.slot in names}
    method = adapter.method.settled(shared)
    if method == adapter.method:
        raise UnsupportedError(
            f"{adapter.method.kind}: it has no gates that choose by example, so there is nothing to settle."
        )
    anatomy = anatomy_of(model)
    new = planned(model, method, to or adapter.name, anatomy)
    layers = {site.path: layer_at(anatomy, site.path) for site in new.sites}
    wanted = [
        TensorName(path, spec.name)
        for (_, path), specs in specs_of(new, anatomy, layers).items()
        for spec in specs.values()
        if spec.stored
    ]
    tensors = {tensor_name: named[tensor_name].detach().clone() for tensor_name in wanted}
    return Adapter(new.name, method, new.sites, tensors, base=adapter.base, origin=new.origin)
