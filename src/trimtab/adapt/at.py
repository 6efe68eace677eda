"""What a hook may know beside x: the site it edits, and the context of this call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.adapt import slots
from trimtab.adapt.context import Context
from trimtab.adapt.route import Part
from trimtab.errors import RouteError
from trimtab.frozen import Layer

if TYPE_CHECKING:
    from trimtab.adapt.edit import Edit


class Held(NamedTuple):
    """A tensor that an edit reads: its slot, and whether it is cast for computation."""

    name: str
    cast: bool


class Around(NamedTuple):
    """The tokens (N, width) that the experts of a mixture were given, and whose they are."""

    part: Part
    x: Tensor


class At:
    """One call of one edit at one site: the site, and the context of this call.

    ``layer`` is the view of the frozen layer, ``x`` what this edit's layer was given (in `leave`), ``part``
    the positions that this owner acts on. ``gates`` is what a gate has decided in this call, ``around`` all
    that the experts of a mixture were given, of which one expert sees a few tokens.
    """

    __slots__ = (
        "around",
        "context",
        "dtype",
        "edit",
        "gates",
        "holder",
        "layer",
        "part",
        "root",
        "training",
        "x",
    )

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
        self.holder: nn.Module | None = None
        self.gates: Tensor | None = None
        self.around: Around | None = None

    @property
    def shared(self) -> dict[str, Tensor]:
        """The adapter's model-level tensors, cast for computation."""
        if self.root is None:
            return {}
        return cast_all(self.edit.shared, self.root, self.edit.adapter, self.dtype)

    @property
    def path(self) -> str:
        """Canonical path of the site."""
        return self.edit.path

    @property
    def role(self) -> str:
        """The method's own word for what it does here."""
        return self.edit.role

    @property
    def block(self) -> int | None:
        """Number of the transformer block, or None outside the blocks."""
        return self.edit.block

    @property
    def index(self) -> int:
        """This site's number among those of its method and role."""
        return self.edit.index

    @property
    def count(self) -> int:
        """How many such sites there are."""
        return self.edit.count

    @property
    def causal(self) -> bool:
        """Whether later positions are hidden from earlier ones."""
        return self.edit.causal

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.edit.adapter

    @property
    def memory(self) -> dict[Any, Any]:
        """What lasts for this forward, and for a whole generation where there is a cache."""
        return self.context.memory

    @property
    def scratch(self) -> dict[Any, Any]:
        """What one site leaves for a later one of the same forward. Take it out (``pop``) when it is read."""
        return self.context.scratch

    def kept(self, key: str, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, kept at this site for as long as none of this edit's own tensors changes.

        Only without gradients; with them it is computed each time.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.holder is None:
            return compute()
        masters = [
            slots.get(self.holder, held.name, self.name) for held in self.edit.tensors.values()
        ]
        stamp = (self.dtype, *((id(t), t._version, t.device) for t in masters))
        found = self.edit.cache.get(key)
        if found is None or found[0] != stamp:
            found = self.edit.cache[key] = (stamp, compute())
        return found[1]

    def pool(self, y: Tensor, part: Part | None = None) -> Tensor:
        """Mean of y_BTC over the visible positions of each unit of this part (or of another) -> (U, C).

        Where an encoder-decoder writes its answer, the first position alone is visible.
        """
        part = self.part if part is None else part
        if self.edit.answers and y.dim() > 2:
            y = y[:, :1]
        flat = y.flatten(0, -2)
        weights = torch.ones(flat.shape[0], dtype=y.dtype, device=y.device)
        if not self.edit.answers:
            weights = self.context.visible(part, y, causal=self.causal).to(y.dtype)
        count, units = part.unit_count, part.units
        if units is None:
            count = self.context.rows_of(y) or count
            units = torch.arange(count, device=y.device)
        if units.shape[0] != flat.shape[0]:
            units = units.repeat_interleave(flat.shape[0] // units.shape[0])
        units = units.to(y.device)
        total = y.new_zeros(count, y.shape[-1]).index_add(0, units, flat * weights[:, None])
        seen = y.new_zeros(count).index_add(0, units, weights)
        return total / seen.clamp_min(1)[:, None]

    def require_prompt(self) -> None:
        """Raise `RouteError` where a generation goes on whose prompt this adapter has not seen."""
        if self.context.begun:
            raise RouteError(
                f"adapter {self.name!r} decides from the prompt, and this generation's prompt was read without it; "
                "route the whole generation to one choice of adapters."
            )

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add an auxiliary loss of this adapter; the engine adds it to the objective once."""
        if not self.context.recomputing:
            self.context.losses.append((self.edit.adapter, name, value))


def cast_all(
    tensors: Mapping[str, Held], holder: nn.Module, adapter: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The casting rule: masters are cast to the computation's dtype, unless their spec keeps them."""
    found = {}
    for short, held in tensors.items():
        tensor = slots.get(holder, held.name, adapter)
        found[short] = tensor.to(dtype) if held.cast else tensor
    return found
