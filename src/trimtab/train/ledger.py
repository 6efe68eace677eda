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


@dataclass(frozen=True)
class Moment:
    """The heaviest moment of a phase: bytes by part; and how many floating-point operations the phase took for how
    many cells (tokens, with padding)."""

    parts: Mapping[str, int]
    flops: int = 0
    cells: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


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
        found: dict[str, tuple[int, int]] = {}  # phase -> (bytes, change after which)
        alive = 0
        starts = [*self._phases, ("", len(self._changes) + 1)]
        place = -1
        for index, change in enumerate(self._changes):
            while place + 1 < len(starts) and starts[place + 1][1] <= index:
                place += 1
                if place < len(self._phases):
                    name = starts[place][0]
                    found[name] = max(found.get(name, (0, 0)), (alive, index))
            alive += self._sizes[change] if change > 0 else -self._sizes[-change]
            if place >= 0:
                name = starts[place][0]
                if alive > found[name][0]:
                    found[name] = (alive, index + 1)
        return {
            name: Moment(self._shared_out(index), self._flops.get(name, 0), self._cells[name])
            for name, (_, index) in found.items()
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
