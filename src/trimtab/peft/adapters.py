"""What is done with the adapters of a model by name, whether or not a tuner is around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from trimtab.adapt.attach import detach
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.tree import sites_of


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: Any = None,
) -> None:
    """Which adapters act, and learn. ``layer_cls`` is PEFT's: all layers here share one bank."""
    bank = bank_of(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    bank.stack(names)
    set_requires_grad(model, [name for name in bank.adapters if name not in names], False)
    set_requires_grad(model, names, not inference_mode)


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Whether adapters learn, whichever act."""
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        adapter = bank_of(model).require(name)
        fixed = adapter.fixed
        for key, tensor in adapter.named().items():
            if key not in fixed and isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None
) -> list[str] | None:
    """Take an adapter out of a model, its configuration too; the names of those that act then.

    ``prefix`` and ``layer_cls`` are PEFT's: an adapter knows its tensors.
    """
    detach(model, adapter_name)
    model.__dict__.get("peft_config", {}).pop(adapter_name, None)
    bank = find_bank(model)
    if bank is None:
        return None
    if not bank.chosen:
        set_adapter(model, next(iter(bank.adapters)))
    return list(bank.chosen)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Adapters are kept in fp32; without ``autocast_adapter_dtype``, in the dtype of the layer they edit."""
    if autocast_adapter_dtype:
        return
    sites = sites_of(model)
    for name, holder in bank_of(model).require(adapter_name).held.items():
        site = sites.get(name.path)
        dtype = getattr(getattr(site, "weight", None), "dtype", None)
        if dtype is not None and dtype.is_floating_point:
            holder.to(dtype)
