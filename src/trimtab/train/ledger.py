"""What is alive, operation by operation, and what for: the account of a run without values.

Storages are counted once, however many tensors look at them, from the operation that makes them to the moment they
are freed. What a storage is for may become known later than it is made (a gradient is first some product of
backward), so the account is a list of births and deaths, and it is summed up afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PARTS = ("weights", "adapter", "gradients", "optimiser", "activations", "logits", "temporary")
"""What memory is for. ``activations`` are what a forward keeps for its backward; ``temporary`` is all that neither
keeps: inner results, gradients of activations, weights that are unpacked."""
LARGE = 32 * 2**20
"""Blocks of so many bytes come from the system one by one, and go back to it; smaller ones share a heap, which does
not shrink (`trimtab.engine.memory`)."""


@dataclass(frozen=True)
class Moment:
    """The heaviest moment of a phase: bytes by part; and how many floating-point operations the phase took for how
    many cells (tokens, with padding).

    ``apart`` are the bytes of the phase with small and large blocks each at their own heaviest moment, because neither
    can lie in what the other left; ``moving`` is the most that small blocks took at once, weights not counted."""

    parts: Mapping[str, int]
    apart: int
    moving: int
    flops: int = 0
    cells: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Heights:
    """Bytes that are alive, or the most of each kind; ``index`` is the change after which all of them were most."""

    whole: int = 0
    small: int = 0
    large: int = 0
    moving: int = 0
    index: int = 0

    def add(self, size: int, *, large: bool, moves: bool) -> None:
        self.whole += size
        if large:
            self.large += size
            return
        self.small += size
        if moves:
            self.moving += size

    def raise_to(self, now: _Heights, index: int) -> None:
        if now.whole > self.whole:
            self.whole, self.index = now.whole, index
        self.small = max(self.small, now.small)
        self.large = max(self.large, now.large)
        self.moving = max(self.moving, now.moving)


class Ledger:
    """Told of every operation (`Hollow`). ``vocabulary`` is the width by which logits are known."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._alive: dict[int, int] = {}  # address of a storage -> its number
        self._sizes = [0]
        self._parts = [""]
        self._changes: list[int] = []  # +number: made; -number: freed
        self._backwards: list[int] = []
        self._inside = False
        self._phases: list[tuple[str, int]] = []
        self._flops: dict[str, int] = {}
        self._cells: dict[str, int] = {}

    def hold(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what these tensors are for."""
        for tensor in tensors:
            if tensor is not None:
                self._parts[self._number(tensor)] = part

    def phase(self, name: str, cells: int = 0) -> None:
        """What comes now belongs to that phase, and is done for so many cells."""
        self._phases.append((name, len(self._changes)))
        self._cells[name] = self._cells.get(name, 0) + cells

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        inside = torch._C._current_autograd_node() is not None
        if inside and not self._inside:
            self._backwards.append(len(self._changes))
        self._inside = inside
        counted = flop_registry.get(func.overloadpacket)
        if counted is not None and self._phases:
            name = self._phases[-1][0]
            flops = counted(*args, **kwargs, out_val=out)
            self._flops[name] = self._flops.get(name, 0) + int(flops)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and (leaf.is_meta or not leaf.is_floating_point()):
                self._number(
                    leaf
                )  # real floats are the host's: weights of tokens, and what waits there

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._alive.get(key)
        if number is None:
            number = len(self._sizes)
            self._alive[key] = number
            self._sizes.append(storage.nbytes())
            wide = (
                tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] == self._vocabulary
            )
            self._parts.append("logits" if wide else "")
            self._changes.append(number)
            weakref.finalize(storage, self._gone, key).atexit = False
        return number

    def _gone(self, key: int) -> None:
        self._changes.append(-self._alive.pop(key))

    def moments(self) -> dict[str, Moment]:
        """The heaviest moment of each phase; a phase that came several times counts once."""
        found: dict[str, _Heights] = {}
        now = _Heights()
        starts = [*self._phases, ("", len(self._changes) + 1)]
        place = -1
        for index, change in enumerate(self._changes):
            while place + 1 < len(starts) and starts[place + 1][1] <= index:
                place += 1
                if place < len(self._phases):
                    found.setdefault(starts[place][0], _Heights()).raise_to(now, index)
            number = abs(change)
            size = self._sizes[number] if change > 0 else -self._sizes[number]
            now.add(
                size, large=self._sizes[number] >= LARGE, moves=self._parts[number] != "weights"
            )
            if place >= 0:
                found[starts[place][0]].raise_to(now, index + 1)
        return {
            name: Moment(
                self._shared_out(most.index),
                most.small + most.large,
                most.moving,
                self._flops.get(name, 0),
                self._cells[name],
            )
            for name, most in found.items()
        }

    def _shared_out(self, index: int) -> dict[str, int]:
        """Bytes by part after the first ``index`` changes."""
        kept = self._kept(index)
        found = dict.fromkeys(PARTS, 0)
        for number in self._living(index):
            part = self._parts[number] or ("activations" if number in kept else "temporary")
            found[part] += self._sizes[number]
        return found

    def _living(self, index: int) -> set[int]:
        alive: set[int] = set()
        for change in self._changes[:index]:
            if change > 0:
                alive.add(change)
            else:
                alive.discard(-change)
        return alive

    def _kept(self, index: int) -> set[int]:
        """What was alive when the backward around or after a moment began."""
        before = [start for start in self._backwards if start <= index]
        after = [start for start in self._backwards if start > index]
        near = before[-1:] + after[:1]
        return set().union(*(self._living(start) for start in near))
