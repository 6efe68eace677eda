"""Frozen layers and their innermost changes as one operation (`trimtab.kernels.lowrank`), in training.

A layer that is called before others with the same x (queries before keys and values, the gate of an MLP before its
other half) computes these as well: x is then read once for all of them. They find theirs done when they are called; one
that is called with anything else computes for itself. Where rows have different adapters, what is frozen is computed
for all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapt.edit import Bound, enter, leave
from trimtab.adapt.route import Layout
from trimtab.kernels import products
from trimtab.kernels.lowrank import Changed, changed_linear
from trimtab.kernels.tracing import traced

if TYPE_CHECKING:
    from trimtab.adapt.site import LayerSite

HOSTS = ("cpu", "meta")
"""Where dropout may be part of one operation with a layer."""
FEWEST = 64
"""Rows from which on it pays to compute the layer for each of several adapters with dropout by itself."""
ALIKE = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""What transformers' families call layers of one module that see the same x, in the order of their calls."""
ACROSS = ("cross", "encdec", "encoder_attn")
"""What is in the name of an attention whose keys and values are those of another stack."""
_AFTER = {name: names[place + 1 :] for names in ALIKE for place, name in enumerate(names)}


Stacks = Sequence[Sequence[Bound]]
"""The edits of each part of a batch."""


class Early(NamedTuple):
    """What a layer makes of an x before it is called with it, but for edits of what comes out."""

    x: Tensor
    version: int
    stacks: Stacks
    split: Layout
    y: Tensor


def arrange(sites: Mapping[str, nn.Module]) -> None:
    """Tell each wrapped layer, by path, which others are called with its x after it."""
    from trimtab.adapt.site import LayerSite

    for path, site in sites.items():
        if isinstance(site, LayerSite):
            after = [sites.get(other) for other in _after(path)]
            site.siblings = tuple(other for other in after if isinstance(other, LayerSite))


def alike(paths: Iterable[str]) -> list[list[str]]:
    """These paths of layers, together where they are called with the same x, in the order of their calls."""
    given = dict.fromkeys(paths)
    found: dict[str, list[str]] = {}
    for path in sorted(given, key=lambda path: -len(_after(path))):
        if path not in found:
            group = [path, *(other for other in _after(path) if other in given)]
            found |= dict.fromkeys(group, group)
    return [group for path, group in found.items() if group[0] == path]


def _after(path: str) -> list[str]:
    """The paths of the layers that are called with the x of one after it."""
    parent, dot, name = path.rpartition(".")
    if any(word in parent.lower() for word in ACROSS):
        return []
    return [f"{parent}{dot}{other}" for other in _AFTER.get(name, ())]


def output(site: LayerSite, x: Tensor, split: Layout, stacks: Stacks) -> Tensor | None:
    """What comes out of a layer for x, which none of its edits changes first; None where it is not so simple."""
    if traced() or not (torch.is_grad_enabled() or site.training):
        return None
    own = _changed(site, x, stacks)
    if own is None:
        return None
    if any(change is not None and change.share for change in own.changes):
        return _one_by_one(site, x, split, stacks, own)
    others = _beside(site, x, split, stacks)
    given = _cast(x if split.inverse is None else split.rows(x))
    layers = (own, *(changed for _, _, changed in others))
    y, *rest = changed_linear(given, *layers, counts=split.counts(x))
    for (other, theirs, _), done in zip(others, rest, strict=True):
        site.bank.early[other] = Early(x, x._version, theirs, split, done)
    return _left(stacks, split, x, y)


def early(site: LayerSite, x: Tensor) -> Tensor | None:
    """What was made of x for this layer already."""
    found = site.bank.early.pop(site, None)
    if found is None or found.x is not x or found.version != x._version:
        return None
    return _left(found.stacks, found.split, x, found.y)


def _one_by_one(
    site: LayerSite, x: Tensor, split: Layout, stacks: Stacks, own: Changed
) -> Tensor | None:
    """Part by part, each with masks of its own."""
    counts = split.counts(x)
    if len(counts) > 1 and min(counts) < FEWEST:
        return None
    made = []
    for part, stack, change in zip(split.parts, stacks, own.changes, strict=True):
        piece = part.take(x)
        if change is None:
            made.append(site.frozen(piece))
        else:
            (y,) = changed_linear(_cast(piece), replace(own, changes=[change]))
            made.append(leave(stack, y, added=True))
    return made[0] if split.whole else split.join(made)


def _left(stacks: Stacks, split: Layout, x: Tensor, y: Tensor) -> Tensor:
    """y of the rows of x, with edits of what comes out."""
    if split.whole:
        return leave(stacks[0], y, added=True)
    pieces = y.flatten(0, -2).split(split.counts(x))
    left, unchanged = [], split.inverse is None
    for part, stack, piece in zip(split.parts, stacks, pieces, strict=True):
        shaped = piece.view(*part.take(x).shape[:-1], -1)
        after = leave(stack, shaped, added=True) if stack else shaped
        unchanged = unchanged and after is shaped
        left.append(after)
    return y if unchanged else split.join(left)


def _cast(x: Tensor) -> Tensor:
    return x.to(products.autocast_dtype(x) or x.dtype)


def _changed(site: LayerSite, x: Tensor, stacks: Stacks) -> Changed | None:
    """The layer with the changes of all parts, where there are some, and they are no more than that."""
    changes = [stack[0].change() if stack else None for stack in stacks]
    if not any(changes) or any(s and c is None for s, c in zip(stacks, changes, strict=True)):
        return None
    if x.device.type not in HOSTS and any(c is not None and c.share for c in changes):
        return None
    layer = site.layer.product_of(x)
    return None if layer is None else Changed(layer, changes, site.room)


def _beside(
    site: LayerSite, x: Tensor, split: Layout, stacks: Stacks
) -> list[tuple[LayerSite, Stacks, Changed]]:
    """The siblings that can be computed with a layer, with their edits."""
    if not site.bank.opened or x.is_inference():
        return []
    found: list[tuple[LayerSite, Stacks, Changed]] = []
    for other in site.siblings:
        if other.training != site.training or other._forward_pre_hooks or "forward" in vars(other):
            continue
        theirs, _, same = other.stacks(x)
        if len(theirs) != len(stacks) or same is not x:
            continue
        if any(bound.edit.enters for stack in theirs for bound in stack):
            continue
        for stack, part in zip(theirs, split.parts, strict=True):
            enter(stack, part.take(x))
        made = _changed(other, x, theirs)
        if made is not None and not any(c is not None and c.share for c in made.changes):
            found.append((other, theirs, made))
    return found
