"""The form of an adapter that is shared: what only training needed is gone, the edit is the same.

A LoRA that began away from zero becomes a plain one of twice the rank, a prefix or a prompt leaves its encoder
behind, masks become bits. PEFT and servers read this form wherever they know the method.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trimtab.adapt.adapter import Adapter, TensorName


def exported(adapter: Adapter, *, name: str | None = None) -> Adapter:
    """An independent adapter with the same edits, of the simplest methods that have them."""
    copy = adapter.detached(name=name)
    if all(method.plain() == method for method in adapter.methods):
        return copy
    parts = _by_method(copy)
    plain = [
        method.plain_for({path: slots for (path, number), slots in parts.items() if number == own})
        for own, method in enumerate(copy.methods)
    ]
    tensors: dict[TensorName, Tensor] = {}
    for (path, number), slots in parts.items():
        method = copy.methods[number].at(path) if path else copy.methods[number]
        place = next((p for p in copy.places(number) if p.path == path), None) if path else None
        new = method.plain_tensors(slots, place)
        tensors |= {TensorName(path, slot): tensor for slot, tensor in new.items()}
    return Adapter(
        copy.name, plain, copy.sites, tensors, base=copy.base, origin=replace(copy.origin)
    )


def _by_method(adapter: Adapter) -> dict[tuple[str, int], dict[str, Tensor]]:
    """The tensors by path and number of the method that they belong to."""
    numbers: dict[str, list[int]] = {"": list(range(len(adapter.methods)))}
    for site in adapter.sites:
        here = numbers.setdefault(site.path, [])
        if site.method not in here:
            here.append(site.method)
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in adapter.named().items():
        here = numbers[name.path]
        owner = next((n for n in here if name.slot in adapter.methods[n].short_names), here[0])
        found.setdefault((name.path, owner), {})[name.slot] = tensor
    return found
