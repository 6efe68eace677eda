"""The contract: what a PEFT method has to say, and all that it may know.

A frozen layer is a map f. A layer-wise method is at most three edits of it:

    y = leave( f( enter(x) ) + delta(x) )

A `Method` is a frozen, validated value. It holds no tensors: it *states* them (name, shape, init) and
is handed them back as ``p`` at each call, already in the dtype of the computation. It says where it
wants to act (`place`), and which of the three edits it makes by overriding them. A method that acts
inside attention overrides `keys_values` or `beside` instead, one that puts a prompt before the text
`virtual_embeddings`. Everything else (merging, mixing, saving, stacking, scaling, disabling, training)
is written once, elsewhere, in terms of these hooks.

Shapes: x_..I and y_..O are whatever the layer takes and gives; R is a rank; U counts units (rows of
the batch, or documents of a packed row).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import field_validator
from torch import Tensor

from trimtab.adapt.at import At as At
from trimtab.adapt.in_peft import InPeft
from trimtab.adapt.observed import Observation as Observation
from trimtab.adapt.observed import Observed as Observed
from trimtab.adapt.patterns import check_patterns as check_patterns
from trimtab.adapt.patterns import exactly as exactly
from trimtab.adapt.patterns import pattern_value as pattern_value
from trimtab.adapt.values import Init as Init
from trimtab.adapt.values import constant as constant
from trimtab.adapt.values import copy_of as copy_of
from trimtab.adapt.values import kaiming_uniform as kaiming_uniform
from trimtab.adapt.values import normal as normal
from trimtab.adapt.values import ones as ones
from trimtab.adapt.values import truncated_normal as truncated_normal
from trimtab.adapt.values import uniform as uniform
from trimtab.adapt.values import uniform_from_zero as uniform_from_zero
from trimtab.adapt.values import zeros as zeros
from trimtab.errors import UnsupportedError
from trimtab.frozen import Layer as Layer

if TYPE_CHECKING:
    from trimtab.kernels.lowrank import Change
    from trimtab.models.anatomy import Anatomy

Params = Mapping[str, Tensor]
"""The tensors of one adapter at one site, by the short names that the method gave them."""

Sites = Mapping["Place", Params]
"""The masters of one adapter by place; those of the whole adapter at ``Place("")``."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of an adapter: where it lies, its shape and its first value.

    ``name`` is its slot (``lora_A.weight``, ``ia3_l``) in PEFT's grammar: in memory the adapter's name is
    inserted before a last ``.weight``, else appended. ``cast`` False keeps the master's dtype in the hooks.
    ``stored`` False is for what ``init`` draws again, from a seed of the method: it is neither trained nor
    written to disk, but a checksum of it is, so that another draw is noticed.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    cast: bool = True
    stored: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """One site that a method asks for. ``role`` is the method's own word for what it does there."""

    path: str
    role: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is: optimiser steps done, this one included, and how many there will be (if known)."""

    step: int
    total: int | None


class Method(InPeft, ABC):
    """One PEFT technique with its hyper-parameters.

    ``targets`` and ``exclude`` select sites (see `trimtab.models.selectors`), ``layers`` restricts them to
    blocks of those indices. ``train`` names modules that are trained in full, per adapter, under the
    same routes (a classification head). With ``layer_drop`` each forward of training leaves the edits out of
    the first n blocks, n drawn anew among 0 .. blocks − 1 (AdapterDrop, arXiv 2010.11918).

    Class facts: ``kind`` is its name in the registry; ``affine`` whether its edits can merge, and
    ``why_not_affine`` the reason if not; ``needs_prompt`` whether a gate must see a prompt; ``lr`` and
    ``weight_decay`` are defaults of training; ``short_names`` (slot -> short name) lets arithmetic work without a
    model. Where a fact depends on the fields, a property says it: `unmergeable`, `default_lr`, `names`. What PEFT
    calls it all is said in `trimtab.adapt.in_peft`.

    ``a | b`` is the union of two methods: one adapter with the edits of both.

    ``scales`` is the short name of a tensor in which the edit is linear, ``adds`` whether edits of equal methods
    add when that tensor does. ``instead_of`` are a layer's own tensors in whose place the method's stand: another
    value of them makes no other base.
    """

    kind: ClassVar[str]
    affine: ClassVar[bool] = True
    why_not_affine: ClassVar[str] = ""
    needs_prompt: ClassVar[bool] = False
    lr: ClassVar[float] = 2e-4
    weight_decay: ClassVar[float] = 0.0
    instead_of: ClassVar[tuple[str, ...]] = ()
    short_names: ClassVar[Mapping[str, str]] = {}
    scales: ClassVar[str] = ""
    adds: ClassVar[bool] = False

    targets: str | tuple[str, ...] = ()
    """Where it acts: roles, names, globs or ``re:`` patterns; where it is empty, the method knows."""
    exclude: str | tuple[str, ...] = ()
    """Of what ``targets`` select, what is left out."""
    layers: tuple[int, ...] | None = None
    """Only in the blocks of these numbers; negative ones count from the last."""
    train: tuple[str, ...] = ()
    """Modules that are trained in full beside it, such as a classification head."""
    layer_drop: bool = False
    """In training, leave the edits out of the first blocks, of another number each time (AdapterDrop)."""

    @field_validator("targets", "exclude", "layers", "train", mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list | set | range) else value

    def __or__(self, other: Method | str) -> Method:
        """One adapter with the edits of both, these innermost."""
        from trimtab.adapt.parse import method_from

        return method_from([self, other])

    def __ror__(self, other: str) -> Method:
        from trimtab.adapt.parse import method_from

        return method_from([other, self])

    # -- facts that may depend on the fields ---------------------------------------------------------

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods that it is made of, each with sites and tensors of its own; by default itself."""
        return (self,)

    @property
    def unmergeable(self) -> str:
        """Why no weight can equal its edits; empty where one can."""
        return "" if self.affine else self.why_not_affine

    @property
    def default_lr(self) -> float:
        """The learning rate where nobody says one."""
        return self.lr

    def pace(self, part: Method) -> float:
        """How many times as fast as the method's own rate one of its `members` learns."""
        return part.default_lr / self.default_lr

    @property
    def names(self) -> Mapping[str, str]:
        """Slot -> short name, of all its slots."""
        return self.short_names

    # -- where and what ------------------------------------------------------------------------------

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        """The sites this method asks for: by default all that its selectors match, with no role."""
        return [Place(path) for path in anatomy.select(self.targets, self.exclude, self.layers)]

    def at(self, path: str) -> Method:
        """The method with the hyper-parameters it has at this site (per-layer patterns)."""
        return self

    def aimed(self, places: Sequence[Place]) -> Self:
        """The method whose selectors name exactly these places (a sum has those of all its parts)."""
        paths = tuple(dict.fromkeys(place.path for place in places))
        return self.replace(targets=paths, exclude=(), layers=None)

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        """The tensors at one site, by short name."""
        return {}

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        """Tensors of the whole adapter, kept beside the model's root."""
        return {}

    @property
    def rebuilt(self) -> frozenset[str]:
        """Slots that PEFT leaves out of its file and makes from the base when it loads, as is done here too."""
        return frozenset()

    @property
    def fixed(self) -> frozenset[str]:
        """Slots that belong to the adapter and its file but are never trained (indices, kept first values)."""
        return frozenset()

    # -- what data tell before it begins -----------------------------------------------------------

    def observes(self, role: str) -> Observation | None:
        """What must be seen of a layer first, asked of `at` each site; `trimtab.attach` then needs batches."""
        return None

    def informed(self, observed: Mapping[str, Sequence[Observed]]) -> Self:
        """The method that data make of this one: ``observed`` by path, one for each expert."""
        return self

    # -- the edits -------------------------------------------------------------------------------------

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        """Edit what goes in."""
        return x

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        """Add something beside the layer; None adds nothing."""
        return None

    def lowrank(self, p: Params, at: At) -> Change | None:
        """A fast path: `delta` as two factors, where it is no more, for a kernel that computes the layer with them.
        ``p`` are the tensors as they are trained, not cast."""
        return None

    def stacks(self, p: Params, role: str) -> Change | None:
        """All that it does to a linear layer at evaluation, where that is to add a product of two factors: such
        adapters lie side by side in one tensor (`trimtab.adapt.stack`). ``p`` are the tensors as they are trained."""
        return None

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        """Edit what comes out. ``at.x`` is what went in."""
        return y

    def keys_values(self, p: Params, at: At) -> tuple[Tensor, Tensor] | None:
        """Keys and values put before an attention's own; None adds none.

        (length, key heads · head width) for all units alike, or (units, length, …) for each unit its own.
        """
        return None

    def beside(self, p: Params, at: At) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values (length, key heads · head width) and gate (1, or heads) of an attention of its own,
        whose output is gated and added to that of the frozen one.
        """
        return None

    def virtual_embeddings(self, shared: Params) -> Tensor | None:
        """(length, width) input embeddings that are read before the text."""
        return None

    @property
    def virtual_tokens(self) -> int:
        """How many positions `keys_values` takes before the real tokens."""
        return 0

    @property
    def prompt_tokens(self) -> int:
        """How many positions `virtual_embeddings` takes before the real tokens."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether what it does to later tokens of a generation is decided at the prompt."""
        return self.needs_prompt

    def ready(self, shared: Params, training: bool) -> Params:
        """What the hooks see as the adapter's shared tensors: made from the masters once per forward.

        An encoder of prompts runs here, so that no layer repeats it. Hooks cast what they take of it.
        """
        return shared

    @property
    def counts_padding(self) -> bool:
        """Whether what it learns depends on cells of padding too (a mean over all of a batch)."""
        return any(part.counts_padding for part in self.members if part is not self)

    @property
    def readies(self) -> bool:
        """Whether it makes something of its shared tensors in `ready`."""
        return self.overrides("ready")

    @property
    def layerwise(self) -> bool:
        """Whether all that it does is to edit layers (so that a gate can scale it)."""
        other = ("keys_values", "beside", "virtual_embeddings")
        return not any(map(self.overrides, other))

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        """A closed form of the merged ``(W', b')`` in fp32, or None: push the identity."""
        return None

    # -- training --------------------------------------------------------------------------------------

    @property
    def rates(self) -> Mapping[str, float]:
        """Slot -> factor on the learning rate, for slots that do not learn at the rate itself."""
        return {}

    def before_step(self, sites: Sites) -> None:
        """Change gradients before an optimiser step, in place."""

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        """Change tensors after an optimiser step, in place (a budget schedule). Gradients are still there.

        ``memory`` is the method's own between steps; it is saved and resumed with the optimiser's state.
        """

    # -- the form to share -----------------------------------------------------------------------------

    def plain(self) -> Method:
        """The simplest method that has the same edit once training is over; by default this one."""
        return self

    def plain_for(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Method:
        """`plain`, where it depends on the tensors too (how many ranks are left); they are by path and slot."""
        return self.plain()

    @property
    def peft_reads(self) -> bool:
        """Whether PEFT, where it has the method, reads it in this form; by default in its `plain` form only."""
        return self.plain() == self

    def remade(self, members: Sequence[Method]) -> Method:
        """This method with others in the place of its `members`."""
        (only,) = members
        return only

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        """The tensors of `plain`, by slot, from these; ``place`` None asks for the whole adapter's."""
        return dict(tensors)

    def settled(self, shared: Params) -> Method:
        """The method whose gates no longer look at examples, from the whole adapter's tensors; by default itself."""
        return self

    # -- arithmetic on one site's tensors --------------------------------------------------------------

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        """The tensors whose edit is ``weight`` times this one's."""
        if self.scales:
            return {**p, self.scales: p[self.scales] * weight}
        raise UnsupportedError(
            f"{self.kind}: its edit is not linear in any of its tensors, so it cannot be scaled."
        )

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """One method and its tensors at this site, whose edit is the sum of the parts' edits."""
        if self.adds and all(_mathematics(method) == _mathematics(self) for method, _ in parts):
            total = torch.stack([p[self.scales] for _, p in parts]).sum(0)
            return self, {**parts[0][1], self.scales: total}
        raise UnsupportedError(
            f"{self.kind}: the sum of two such edits is not an edit of the same kind."
        )

    # -- values ----------------------------------------------------------------------------------------

    def to_dict(self, *, given: bool = False) -> dict[str, Any]:
        """JSON-able, with its kind: what `trimtab.adapt.parse.method_from` reads back.

        ``given`` leaves out the fields that were not set.
        """
        one = {name: value for name, value in self if isinstance(value, Method)}
        several = {n: v for n, v in self if isinstance(v, tuple) and v and isinstance(v[0], Method)}
        nested = {name: method.to_dict(given=given) for name, method in one.items()} | {
            name: [method.to_dict(given=given) for method in each] for name, each in several.items()
        }
        own = self.model_dump(mode="json", exclude=set(nested), exclude_unset=given)
        said = self.model_fields_set if given else set(nested)
        return {"kind": self.kind, **own, **{n: v for n, v in nested.items() if n in said}}

    def overrides(self, hook: str) -> bool:
        """Whether this class makes that edit at all."""
        return getattr(type(self), hook) is not getattr(Method, hook)


def _mathematics(method: Method) -> dict[str, Any]:
    """All that a method says but where it acts."""
    where = ("targets", "exclude", "layers", "layer_drop", "train")
    return {"kind": method.kind, **{name: value for name, value in method if name not in where}}
