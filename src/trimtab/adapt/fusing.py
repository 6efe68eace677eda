"""Frozen layers and their innermost changes as one operation (`trimtab.kernels.lowrank`), in training.

A layer that is called before others with the same x (queries before keys and values, the gate of an MLP before its
other half) computes these as well: x is then read once for all of them. They find theirs done when they are called; one
that is called with anything else computes for itself, and is not computed early again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapt.edit import Bound, enter, leave
from trimtab.kernels import products
from trimtab.kernels.lowrank import Changed, changed_linear
from trimtab.kernels.tracing import traced

if TYPE_CHECKING:
    from trimtab.adapt.site import LayerSite

HOSTS = ("cpu", "meta")
"""Where dropout may be part of one operation with a layer."""
FEWEST = 64
"""Rows from which on it pays to compute the layer for each of several adapters by itself."""
ALIKE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""What transformers' families call layers of one module that see the same x, in the order of their calls."""
_AFTER = {name: names[place + 1 :] for names in ALIKE for place, name in enumerate(names)}


class Early(NamedTuple):
    """What a layer makes of an x before it is called with it."""

    leader: LayerSite
    x: Tensor
    version: int
    stack: Sequence[Bound]
    y: Tensor


def arrange(sites: Mapping[str, nn.Module]) -> None:
    """Tell each wrapped layer, by path, which others are called with its x after it."""
    from trimtab.adapt.site import LayerSite

    for path, site in sites.items():
        if isinstance(site, LayerSite):
            parent, dot, name = path.rpartition(".")
            after = [sites.get(f"{parent}{dot}{other}") for other in _AFTER.get(name, ())]
            site.siblings = tuple(other for other in after if isinstance(other, LayerSite))


def outputs(
    site: LayerSite, stacks: Sequence[Sequence[Bound]], pieces: Sequence[Tensor], *, whole: bool
) -> list[Tensor] | None:
    """What comes out of each piece of a batch, or of the ``whole``; None where a layer is not so simple."""
    if traced() or not (torch.is_grad_enabled() or site.training):
        return None
    if len(pieces) > 1 and min(piece.shape[:-1].numel() for piece in pieces) < FEWEST:
        return None
    made = [_changed(site, stack, x) for stack, x in zip(stacks, pieces, strict=True)]
    if any(stack and one is None for stack, one in zip(stacks, made, strict=True)):
        return None
    found = []
    for stack, x, one in zip(stacks, pieces, made, strict=True):
        if one is None:
            found.append(site.frozen(x))
            continue
        others = _beside(site, x, one) if whole else []
        given = x.to(products.autocast_dtype(x) or x.dtype)
        y, *rest = changed_linear(given, one, *(changed for _, _, changed in others))
        for (other, own, _), done in zip(others, rest, strict=True):
            site.bank.early[other] = Early(site, x, x._version, own, done)
        found.append(leave(stack, y, added=True))
    return found


def early(site: LayerSite, x: Tensor) -> Tensor | None:
    """What was made of x for this layer already."""
    found = site.bank.early.pop(site, None)
    if found is None:
        return None
    if found.x is not x or found.version != x._version:
        found.leader.siblings = ()
        return None
    return leave(found.stack, found.y, added=True)


def _changed(site: LayerSite, stack: Sequence[Bound], x: Tensor) -> Changed | None:
    change = stack[0].change() if stack else None
    if change is None or (change.share and x.device.type not in HOSTS):
        return None
    layer = site.layer.product_of(x)
    return None if layer is None else Changed(layer, change, site.room)


def _beside(
    site: LayerSite, x: Tensor, own: Changed
) -> list[tuple[LayerSite, Sequence[Bound], Changed]]:
    """The siblings that can be computed with a layer, with their edits."""
    if own.change.share or not site.bank.opened or x.is_inference():
        return []
    found: list[tuple[LayerSite, Sequence[Bound], Changed]] = []
    for other in site.siblings:
        if other.training != site.training or other._forward_pre_hooks or "forward" in vars(other):
            continue
        stacks, _, same = other.stacks(x)
        if not any(stacks) or same is not x or any(bound.edit.enters for bound in stacks[0]):
            continue
        enter(stacks[0], x)
        made = _changed(other, stacks[0], x)
        if made is not None and not made.change.share:
            found.append((other, stacks[0], made))
    return found
