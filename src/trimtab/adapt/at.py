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
from trimtab.frozen import Layer, stamp

if TYPE_CHECKING:
    from trimtab.adapt.edit import Edit


class Held(NamedTuple):
    """A tensor that an edit reads: its slot, and whether it is cast for computation."""

    name: str
    cast: bool


PROMPT = "prompt"
"""Key of what a generation remembers: that this adapter has seen the prompt."""


class PromptRanks(NamedTuple):
    """For each position (flattened), its rank from the start and from the end of its unit's prompt, or -1."""

    from_start: Tensor
    from_end: Tensor
    units: Tensor
    unit_count: int


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
        "_generator",
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
        self._generator: torch.Generator | None = None

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What this call of the edit draws its random numbers from; None: torch's own. Methods that draw must use it,
        so that an adapter that trains beside others draws what it would draw alone."""
        if self._generator is None:
            self._generator = self.context.generator(self.name, self.path, device)
        return self._generator

    def per_unit(self, drawn: Callable[[int], Tensor]) -> Tensor:
        """What is drawn for each unit that this owner acts on, in their order, laid out for all units of the batch.
        Others have 0, so that it does not matter how many they are."""
        part, route = self.part, self.context.route
        if part.units is not None:
            own = part.members(part.units.device)
        elif route.every or len(route.owners) != part.unit_count:
            return drawn(part.unit_count)
        else:
            own = torch.tensor([u for u, who in enumerate(route.owners) if who == part.owner])
        values = drawn(len(own))
        if len(own) == part.unit_count:
            return values
        laid = values.new_zeros(part.unit_count, *values.shape[1:])
        return laid.index_copy(0, own.to(values.device), values)

    @property
    def shared(self) -> dict[str, Tensor]:
        """The adapter's model-level tensors, cast for computation; or what `Method.ready` made of them."""
        if self.root is None:
            return {}
        if self.edit.readies:
            return readied(self.edit, self.context, self.root, self.dtype, self.training)
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
        """``compute()``, kept at this site for as long as neither this edit's tensors nor the layer's change.

        Only without gradients; with them it is computed each time.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.holder is None:
            return compute()
        masters = [
            slots.get(self.holder, held.name, self.name) for held in self.edit.tensors.values()
        ]
        now = (self.dtype, *stamp([*masters, *self.layer.holding()]))
        found = self.edit.cache.get(key)
        if found is None or found[0] != now:
            found = self.edit.cache[key] = (now, compute())
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
        count = part.unit_count
        if part.units is None:
            count = self.context.rows_of(y) or count
        units = self._units(y, part, count)
        total = y.new_zeros(count, y.shape[-1]).index_add(0, units, flat * weights[:, None])
        seen = y.new_zeros(count).index_add(0, units, weights)
        return total / seen.clamp_min(1)[:, None]

    def prompt_ranks(self, y: Tensor) -> PromptRanks | None:
        """Where each position of y_..C stands in its unit's prompt; None when the prompt lies in the cache already.

        Raises:
            RouteError: nothing tells the prompt, or it was read without this adapter.
        """
        context = self.context
        if y.dim() > 3:
            raise RouteError(
                f"adapter {self.name!r}: {self.path} gives a tensor of shape {tuple(y.shape)}, whose positions cannot "
                "be told apart; target a module that gives (batch, positions, width)."
            )
        if context.decoding:
            if (self.name, PROMPT) not in self.memory:
                raise RouteError(
                    f"adapter {self.name!r} acts on the prompt, and this generation's prompt was read without it; "
                    "route the whole generation to one choice of adapters."
                )
            return None
        self.memory[self.name, PROMPT] = True
        key = (self.part.owner, *y.shape[:-1])
        if key not in context.ranks:
            seen = context.visible(self.part, y, causal=self.causal)
            context.ranks[key] = _ranks(
                seen, self._units(y, self.part, y.shape[0]), self.part.unit_count
            )
        return context.ranks[key]

    def _units(self, y: Tensor, part: Part, rows: int) -> Tensor:
        """The unit of each position of y_..C, among the units of a part (its rows, where it names none)."""
        units, count = part.units, y[..., 0].numel()
        units = torch.arange(rows) if units is None else units
        if units.shape[0] != count:
            units = units.repeat_interleave(count // units.shape[0])
        return units.to(y.device)

    def require_prompt(self) -> None:
        """Raise `RouteError` where a generation goes on whose prompt this adapter has not seen."""
        if self.context.decoding:
            raise RouteError(
                f"adapter {self.name!r} decides from the prompt, and this generation's prompt was read without it; "
                "route the whole generation to one choice of adapters."
            )

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add an auxiliary loss of this adapter; the engine adds it to the objective once."""
        if not self.context.recomputing:
            self.context.losses.append((self.edit.adapter, name, value))


def _ranks(seen: Tensor, units: Tensor, unit_count: int) -> PromptRanks:
    """Ranks among the seen positions, unit by unit; the positions of a unit follow one another."""
    seen = seen.to(torch.long)
    before = seen.cumsum(0) - seen
    nothing = before.new_full((unit_count,), int(seen.shape[0]))
    start = nothing.scatter_reduce(0, units, before, "amin")
    total = seen.new_zeros(unit_count).index_add(0, units, seen)
    from_start = torch.where(seen > 0, before - start[units], -1)
    from_end = torch.where(seen > 0, total[units] - 1 - from_start, -1)
    return PromptRanks(from_start, from_end, units, unit_count)


def readied(
    edit: Edit, context: Context, root: nn.Module, dtype: torch.dtype, training: bool
) -> dict[str, Tensor]:
    """What the method makes of its shared tensors: once per forward, where its entry saw to it."""
    found = context.ready.get(edit.source)
    if found is None:
        masters = {
            short: slots.get(root, held.name, edit.adapter) for short, held in edit.shared.items()
        }
        wide = {
            short: master.to(torch.promote_types(master.dtype, dtype))
            for short, master in masters.items()
        }
        found = dict(edit.method.ready(wide, training))
    return found


def cast_all(
    tensors: Mapping[str, Held], holder: nn.Module, adapter: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The casting rule: masters are cast to the computation's dtype, unless their spec keeps them."""
    found = {}
    for short, held in tensors.items():
        tensor = slots.get(holder, held.name, adapter)
        found[short] = tensor.to(dtype) if held.cast else tensor
    return found
