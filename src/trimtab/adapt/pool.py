"""Low-rank factors of many adapters of one form, side by side: at each place one pair of tensors, a slot for each.

    A_SIR, B_SRO   in the dtype of the base; the scale is in B, multiplied in fp32 before it is rounded

Ranks of a place are made equal by zeros, up to a power of two; adapters whose ranks or places differ by more have
another form, and so a pool of their own. What is called with the same x has one A, of all its ranks side by side: x is
read once for queries, keys and values. A slot never moves; memory grows by doubling.

Legend: S slots, I inputs, O outputs, R ranks, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adapt import fusing
from trimtab.frozen import Layer
from trimtab.kernels.lowrank import Change
from trimtab.kernels.stacked import Rows, stacked_product
from trimtab.kernels.tracing import traced

LEAST = 8
"""Ranks that a slot has room for at least."""
BEGIN = 4
"""Slots of a new pool."""
Form = tuple[tuple[str, int], ...]
"""The places where adapters act, by path, and the ranks that they have room for there."""


def form_of(changes: Mapping[str, Change]) -> Form:
    """The form of an adapter that changes these places."""
    ranks = {path: len(change.a_RI) for path, change in changes.items()}
    return tuple(sorted((path, max(LEAST, 1 << (r - 1).bit_length())) for path, r in ranks.items()))


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of a batch whose adapters lie in one pool: where they are (None: everywhere), and in which slots."""

    pool: Pool
    index: Tensor | None
    rows: Rows


class _Read(NamedTuple):
    """What the A of several places made of an x."""

    x: Tensor
    version: int
    h_NR: Tensor


class _Group:
    """Places that are called with the same x."""

    def __init__(self, paths: Iterable[str], ranks: Mapping[str, int], layer: Layer) -> None:
        self.columns: dict[str, slice] = {}
        """Path -> its ranks among those of all."""
        total = 0
        for path in paths:
            self.columns[path] = slice(total, total + ranks[path])
            total += ranks[path]
        self.a_SIR = _empty(layer, 0, layer.in_features, total)


class Pool:
    """See the module. ``layers`` are the frozen layers of the form's places."""

    def __init__(self, form: Form, layers: Mapping[str, Layer]) -> None:
        self.form = form
        ranks = dict(form)
        self._groups: dict[str, _Group] = {}
        for alike in fusing.alike(ranks):
            same = len({layers[path].in_features for path in alike}) == 1
            for paths in [alike] if same else [[path] for path in alike]:
                group = _Group(paths, ranks, layers[paths[0]])
                self._groups |= dict.fromkeys(paths, group)
        self._b_SRO = {
            path: _empty(layers[path], 0, rank, layers[path].out_features) for path, rank in form
        }
        self.capacity = 0
        self.taken: set[int] = set()

    def __contains__(self, path: str) -> bool:
        return path in self._b_SRO

    @property
    def slot_bytes(self) -> int:
        """Of one slot."""
        a_SIR = [group.a_SIR for group in dict.fromkeys(self._groups.values())]
        held = (*a_SIR, *self._b_SRO.values())
        return sum(t.shape[1:].numel() * t.element_size() for t in held)

    @property
    def nbytes(self) -> int:
        return self.capacity * self.slot_bytes

    def growth(self, allowed: int) -> int:
        """How many slots it would have next, where it may take so many more bytes."""
        wanted = max(BEGIN, 2 * self.capacity)
        return min(wanted, self.capacity + allowed // self.slot_bytes)

    def grow(self, capacity: int) -> None:
        """Have room for so many adapters; those that are there stay where they are."""
        with torch.inference_mode(False), torch.no_grad():
            for group in dict.fromkeys(self._groups.values()):
                group.a_SIR = _longer(group.a_SIR, capacity)
            for path, b_SRO in self._b_SRO.items():
                self._b_SRO[path] = _longer(b_SRO, capacity)
        self.capacity = capacity

    def free(self) -> int | None:
        """The first free slot, if there is one."""
        return next((slot for slot in range(self.capacity) if slot not in self.taken), None)

    @torch.no_grad()
    def write(self, slot: int, changes: Mapping[str, Change]) -> None:
        """Copy an adapter's factors into a slot."""
        for path, change in changes.items():
            group, rank = self._groups[path], len(change.a_RI)
            a_IR = group.a_SIR[slot, :, group.columns[path]]
            b_RO = self._b_SRO[path][slot]
            a_IR[:, :rank].copy_(change.a_RI.T)
            a_IR[:, rank:].zero_()
            wide = torch.promote_types(change.b_OR.dtype, torch.float32)
            b_RO[:rank].copy_(change.b_OR.T.to(wide) * change.scale)
            b_RO[rank:].zero_()
        self.taken.add(slot)

    def delta(self, path: str, x: Tensor, share: Share, scratch: dict[Any, Any]) -> Tensor:
        """What is added at a place to the rows of a share of x_..I."""
        group = self._groups[path]
        h_NR = self._read(group, x, share, scratch)[:, group.columns[path]]
        return stacked_product(h_NR, self._b_SRO[path], share.rows)

    def _read(self, group: _Group, x: Tensor, share: Share, scratch: dict[Any, Any]) -> Tensor:
        """x by the A of all places that are called with it; done once for all of them."""
        if len(group.columns) == 1 or x.is_inference():
            return self._reduced(group, x, share)
        found = scratch.get(group)
        if found is None or not _same(found, x):
            found = scratch[group] = _Read(x, x._version, self._reduced(group, x, share))
        return found.h_NR

    def _reduced(self, group: _Group, x: Tensor, share: Share) -> Tensor:
        x_NI = x.flatten(0, -2).to(group.a_SIR.dtype)
        chosen_NI = x_NI if share.index is None else x_NI[share.index]
        return stacked_product(chosen_NI, group.a_SIR, share.rows)


def _same(read: _Read, x: Tensor) -> bool:
    """Whether x is what was read, unchanged since; views of the same rows are made anew for each layer."""
    if read.version != x._version or read.x.shape != x.shape:
        return False
    return read.x is x or (not traced() and read.x.data_ptr() == x.data_ptr())


def _empty(layer: Layer, *shape: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=layer.dtype, device=layer.device)


def _longer(old: Tensor, capacity: int) -> Tensor:
    new = old.new_empty(capacity, *old.shape[1:])
    new[: len(old)] = old
    return new
