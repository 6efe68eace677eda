"""A method bound to one site for one adapter, and the nesting of several around one layer.

    y = leave( f( enter(x) ) + delta(x) ),   nested in the order of activation, the first innermost.

This is the one place where adapter tensors are cast (fp32 masters, computation in the layer's dtype)
and where an edit is scaled: each of the three edits is moved that far from doing nothing,
``e(v) -> v + s · (e(v) − v)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.at import At, Held, cast_all
from trimtab.adapt.contract import Method, Spec
from trimtab.kernels.lowrank import Change


class Edit:
    """One adapter's method at one site; its tensors lie in slots below the module that holds the site."""

    def __init__(
        self,
        *,
        adapter: str,
        method: Method,
        path: str,
        role: str,
        block: int | None,
        blocks: int,
        order: tuple[int, int],
        causal: bool,
        answers: bool,
        specs: Mapping[str, Spec],
        shared: Mapping[str, Spec],
        home: nn.Module | None = None,
    ) -> None:
        self.adapter = adapter
        self.method = method
        self.path = path
        self.role = role
        self.block = block
        self.blocks = blocks
        self.index, self.count = order
        self.causal = causal
        self.answers = answers
        self.tensors = {short: Held(spec.name, spec.cast) for short, spec in specs.items()}
        self.shared = {short: Held(spec.name, spec.cast) for short, spec in shared.items()}
        self.home = home
        """The site whose tensors it reads, where it has none of its own (`trimtab.adapt.tied`)."""
        self.enters = method.overrides("enter")
        self.adds = method.overrides("delta")
        self.fuses = method.overrides("lowrank")
        self.leaves = method.overrides("leave")
        self.readies = method.readies
        self.source = (adapter, *(held.name for held in self.shared.values()))
        """Which adapter's shared tensors, and which of them: the key of what `Method.ready` makes of them."""
        self.scale = 1.0
        """How far this one edit goes, beside what the whole adapter's scale says (`trimtab.adapt.looks`)."""
        self.cache: dict[str, tuple[object, Tensor]] = {}
        """What `At.kept` keeps; not part of a copy."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}

    def params(self, holder: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """This site's tensors, cast for computation."""
        return cast_all(self.tensors, self.home or holder, self.adapter, dtype)


def enter(stack: Sequence[Bound], x: Tensor) -> Tensor:
    """All entering edits of a stack, outermost first; each edit remembers the x it was given."""
    for bound in reversed(stack):
        bound.call.x = x
        if bound.edit.enters:
            x = bound.scaled(x, bound.edit.method.enter(bound.params, x, bound.call))
    return x


def leave(stack: Sequence[Bound], y: Tensor, *, added: bool = False) -> Tensor:
    """All additions and leaving edits of a stack, innermost first; the first addition may be ``added`` already."""
    for place, bound in enumerate(stack):
        if bound.edit.adds and not (added and place == 0):
            delta = bound.edit.method.delta(bound.params, bound.call.x, bound.call)
            if delta is not None:
                y = y + (delta if bound.scale == 1.0 else delta * bound.scale).to(y.dtype)
        if bound.edit.leaves:
            y = bound.scaled(y, bound.edit.method.leave(bound.params, y, bound.call).to(y.dtype))
    return y


class Bound:
    """An edit with its tensors and scale, for one call."""

    __slots__ = ("_cast", "_params", "call", "edit", "scale")

    def __init__(
        self, edit: Edit, cast: Callable[[torch.dtype], dict[str, Tensor]], scale: float, call: At
    ) -> None:
        self.edit = edit
        self.scale = scale
        self.call = call
        self._cast = cast
        self._params: dict[str, Tensor] | None = None

    @property
    def params(self) -> dict[str, Tensor]:
        """The tensors, cast for computation."""
        if self._params is None:
            self._params = self._cast(self.call.dtype)
        return self._params

    def change(self) -> Change | None:
        """What the edit adds to the frozen layer, where that is no more than a product of low rank."""
        if not self.edit.fuses:
            return None
        exact = self._cast(torch.promote_types(self.call.dtype, torch.float32))
        change = self.edit.method.lowrank(exact, self.call)
        if change is None or self.scale == 1.0:
            return change
        return replace(change, scale=change.scale * self.scale)

    def scaled(self, before: Tensor, after: Tensor) -> Tensor:
        return (
            after
            if self.scale == 1.0 or after is before
            else before + self.scale * (after - before)
        )


def around(stack: Sequence[Bound], x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """The edited layer, for a stack that covers all of x."""
    return leave(stack, layer(enter(stack, x)))
