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
    plain = adapter.method.plain().replace(train=adapter.method.train)
    copy = adapter.detached(name=name)
    if plain == adapter.method:
        return copy
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for tensor_name, number in copy.owners.items():
        at_path = found.setdefault((tensor_name.path, number), {})
        at_path[tensor_name.slot] = copy.named()[tensor_name]
    tensors: dict[TensorName, Tensor] = {}
    for (path, number), slots in found.items():
        method = copy.methods[number].at(path) if path else copy.methods[number]
        place = next((p for p in copy.places(number) if p.path == path), None) if path else None
        new = method.plain_tensors(slots, place)
        tensors |= {TensorName(path, slot): tensor for slot, tensor in new.items()}
    return Adapter(
        copy.name, plain, copy.sites, tensors, base=copy.base, origin=replace(copy.origin)
    )

