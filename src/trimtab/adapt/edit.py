"""A method bound to one site for one adapter, and the nesting of several around one layer.

    y = leave( f( enter(x) ) + delta(x) ),   nested in the order of activation, the first innermost.

This is the one place where adapter tensors are cast (fp32 masters, computation in the layer's dtype)
and where an edit is scaled: each of the three edits is moved that far from doing nothing,
``e(v) -> v + s · (e(v) − v)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt import slots
from trimtab.adapt.context import Context
from trimtab.adapt.contract import Method, Spec
from trimtab.adapt.route import Part
from trimtab.errors import RouteError
from trimtab.frozen import Layer


class Call:
    """One call of one edit: what its hooks may know (`trimtab.adapt.contract.At`)."""

    __slots__ = ("context", "dtype", "edit", "layer", "part", "root", "training", "x")

    def __init__(
        self,
        edit: Edit,
        layer: Layer,
        context: Context,
        part: Part,
        root: nn.Module | None,
        dtype: torch.dtype,
        training: bool,
    ) -> None:
        self.edit = edit
        self.layer = layer
        self.context = context
        self.part = part
        self.root = root
        self.dtype = dtype
        self.training = training
        self.x = torch.empty(0)

    @property
    def shared(self) -> dict[str, Tensor]:
        """The adapter's model-level tensors, cast for computation."""
        if self.root is None:
            return {}
        return cast_all(self.edit.shared, self.root, self.edit.adapter, self.dtype)

    @property
    def path(self) -> str:
        return self.edit.path

    @property
    def role(self) -> str:
        return self.edit.role

    @property
    def block(self) -> int | None:
        return self.edit.block

    @property
    def index(self) -> int:
        return self.edit.index

    @property
    def count(self) -> int:
        return self.edit.count

    @property
    def causal(self) -> bool:
        return self.edit.causal

    @property
    def name(self) -> str:
        return self.edit.adapter

    @property
    def memory(self) -> dict[str, Any]:
        return self.context.memory

    def pool(self, y: Tensor) -> Tensor:
        """Mean of y_BTC over the visible positions of each unit of this part -> (U, C)."""
        part, context = self.part, self.context
        flat = y.flatten(0, -2)
        weights = context.visible(part, y, causal=self.causal).to(y.dtype)
        units = part.units if part.units is not None else torch.arange(y.shape[0], device=y.device)
        if units.shape[0] != flat.shape[0]:
            units = units.repeat_interleave(flat.shape[0] // units.shape[0])
        units = units.to(y.device)
        total = y.new_zeros(part.unit_count, y.shape[-1]).index_add(0, units, flat * weights[:, None])
        seen = y.new_zeros(part.unit_count).index_add(0, units, weights)
        return total / seen.clamp_min(1)[:, None]

    def require_prompt(self) -> None:
        past = self.context.past
        if past is not None and int(past.get_seq_length()) > 0:
            raise RouteError(
                f"adapter {self.name!r} decides from the prompt, and this generation's prompt was read without it; "
                "route the whole generation to one choice of adapters."
            )

    def add_loss(self, name: str, value: Tensor) -> None:
        if not self.context.recomputing:
            self.context.losses.append((self.edit.adapter, name, value))


class Edit:
    """One adapter's method at one site. ``tensors`` maps short names to slots below ``holder``."""

    def __init__(
        self,
        *,
        adapter: str,
        method: Method,
        path: str,
        role: str,
        block: int | None,
        order: tuple[int, int],
        causal: bool,
        specs: Mapping[str, Spec],
        shared: Mapping[str, Spec],
    ) -> None:
        self.adapter = adapter
        self.method = method
        self.path = path
        self.role = role
        self.block = block
        self.index, self.count = order
        self.causal = causal
        self.specs = dict(specs)
        self.shared = dict(shared)
        self.enters = method.overrides("enter")
        self.adds = method.overrides("delta")
        self.leaves = method.overrides("leave")

    def params(self, holder: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """This site's tensors, cast for computation."""
        return cast_all(self.specs, holder, self.adapter, dtype)


def cast_all(specs: Mapping[str, Spec], holder: nn.Module, adapter: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The casting rule: masters are cast to the computation's dtype, unless their spec keeps them."""
    found = {}
    for short, spec in specs.items():
        tensor = slots.get(holder, spec.name, adapter)
        found[short] = tensor.to(dtype) if spec.cast else tensor
    return found


def enter(stack: Sequence[Bound], x: Tensor) -> Tensor:
    """All entering edits of a stack, outermost first; each edit remembers the x it was given."""
    for bound in reversed(stack):
        bound.call.x = x
        if bound.edit.enters:
            x = bound.scaled(x, bound.edit.method.enter(bound.params, x, bound.call))
    return x


def leave(stack: Sequence[Bound], y: Tensor) -> Tensor:
    """All additions and leaving edits of a stack, innermost first."""
    for bound in stack:
        if bound.edit.adds:
            delta = bound.edit.method.delta(bound.params, bound.call.x, bound.call)
            if delta is not None:
                y = y + (delta if bound.scale == 1.0 else delta * bound.scale).to(y.dtype)
        if bound.edit.leaves:
            y = bound.scaled(y, bound.edit.method.leave(bound.params, y, bound.call).to(y.dtype))
    return y


class Bound:
    """An edit with its tensors and scale, for one call."""

    __slots__ = ("call", "edit", "params", "scale")

    def __init__(self, edit: Edit, params: Mapping[str, Tensor], scale: float, call: Call) -> None:
        self.edit = edit
        self.params = params
        self.scale = scale
        self.call = call

    def scaled(self, before: Tensor, after: Tensor) -> Tensor:
        return after if self.scale == 1.0 else before + self.scale * (after - before)


def around(stack: Sequence[Bound], x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """The edited layer, for a stack that covers all of x."""
    return leave(stack, layer(enter(stack, x)))
