"""A fusion of trained adapters: their tensors, fixed, in one new adapter that learns to choose among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.fingerprint import fingerprint
from trimtab.adapt.parse import method_from
from trimtab.adapt.plan import checked
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import UnsupportedError


def fused(
    model: nn.Module,
    adapters: Sequence[Adapter],
    name: str,
    *,
    train: Sequence[str] = (),
    seed: int = 0,
) -> Adapter:
    """Attach an AdapterFusion (arXiv 2005.00247) of trained adapters, as one new adapter that stands alone.

    Args:
        model: the base; the adapters may be attached to it or not.
        adapters: two or more that act at the same sites (bottleneck, pfeiffer, adapterplus, compacter).
        name: of the new adapter.
        train: modules to train in full beside it (a new head); the adapters' own heads stay behind.
        seed: of the initial values.

    Raises:
        ConfigError, TargetError: methods that do not fuse, or different sites.
        UnsupportedError: an adapter that trained something else in full beside its head, such as norms.
    """
    anatomy = anatomy_of(model)
    base = fingerprint(model, anatomy.modules)
    given = [checked(adapter, None, base, any_base=False) for adapter in adapters]
    for adapter in given:
        beside = [
            site.path for site in adapter.sites if site.method and site.path not in anatomy.head
        ]
        if beside:
            raise UnsupportedError(
                f"{adapter.name!r} was trained with {beside[0]!r} in full, and would act otherwise without it; "
                "fuse adapters that train nothing but themselves and a head."
            )
    parts = [adapter.method.replace(train=()).to_dict() for adapter in given]
    method = method_from({"kind": "fusion", "parts": parts, "train": tuple(train)})
    new = attach(model, method, name, seed=seed)
    try:
        _fill(new, given)
    except BaseException:
        detach(model, name)
        raise
    return new


def _fill(new: Adapter, given: Sequence[Adapter]) -> None:
    """Copy the tensors of the parts."""
    held = new.named()
    wanted = {tensor_name for tensor_name in held if tensor_name in new.fixed}
    for number, adapter in enumerate(given):
        whole = {site.path for site in adapter.sites if site.method}
        for tensor_name, tensor in adapter.named().items():
            if tensor_name.path in whole:
                continue
            slot = TensorName(tensor_name.path, f"part{number}_{tensor_name.slot}")
            if slot not in held or held[slot].shape != tensor.shape:
                raise UnsupportedError(
                    f"{adapter.name!r} has {tensor_name.key!r}, which has no place in the fusion."
                )
            with torch.no_grad():
                held[slot].copy_(tensor)
            wanted.discard(slot)
    if wanted:
        raise UnsupportedError(
            f"no adapter has {sorted(n.key for n in wanted)[0]!r}, which the fusion needs."
        )
