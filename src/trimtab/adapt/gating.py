"""Gates around another method: what SpotTune, AdaFit and UniPELT's gates share.

    enter, leave:  v -> g · e(v) + (1 − g) · v        delta:  Δ(x) -> g · Δ(x)

An open gate (1) is the inner method and a closed one (0) the base, bitwise. What a gate decides for a sequence it
decides once: at the first forward of a generation (of a causal model: from its prompt), and again, with the same
result, where a block is recomputed for its gradients.

Shapes: U units (sequences), C channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator
from torch import Tensor

from trimtab.adapt.contract import (
    At,
    Layer,
    Method,
    Observation,
    Observed,
    Params,
    Place,
    Progress,
    Sites,
    Spec,
)
from trimtab.adapt.parse import method_from
from trimtab.frozen.experts import ExpertLayer
from trimtab.frozen.norm import NormLayer
from trimtab.models.anatomy import Anatomy

OWN = "gate_"
"""What the short names of a gate's own tensors begin with; the others are the inner method's."""


class Gating(Method):
    """A method that scales the edits of ``inner``, which has its places and tensors."""

    affine: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True
    in_attention: ClassVar[bool] = False
    """Whether it can also scale keys and values that stand before an attention's own."""
    skips: ClassVar[bool] = False
    """Whether each row's gate is 0 or 1 at evaluation, so that closed rows need no inner method."""

    inner: Any = "lora"
    """The method whose edits are gated."""

    @field_validator("inner")
    @classmethod
    def _inner(cls, value: Any) -> Method:
        inner = method_from(value)
        edits = [hook for hook in ("enter", "delta", "leave") if inner.overrides(hook)]
        if len(inner.members) > 1 or isinstance(inner, Gating):
            raise ValueError(f"{inner.kind} has edits of several kinds; gate each of its parts")
        attends = cls.in_attention and inner.overrides("keys_values")
        if not attends and (not inner.layerwise or not edits):
            raise ValueError(
                f"{inner.kind} does not edit layers on its own; choose a layer-wise method"
            )
        if inner.train or inner.layer_drop:
            raise ValueError("train and layer_drop are written in the gate, not in what it gates")
        return inner

    @model_validator(mode="after")
    def _places(self) -> Self:
        if self.targets or self.exclude or self.layers is not None:
            raise ValueError("the inner method says where it acts: inner=lora(targets='mlp')")
        return self

    # -- what a gate says ------------------------------------------------------------------------------

    @abstractmethod
    def decide(self, p: Params, value: Tensor, at: At) -> Tensor:
        """The gates of this call: (U,) or (U, C) by unit, or of the shape that `over` expects."""

    def over(self, gates: Tensor, like: Tensor, at: At) -> Tensor:
        """The gates, shaped to multiply the edited values."""
        if gates.dim() == 1:
            return at.part.spread(gates, like)
        return from_last(at.part.spread(gates, to_last(like, at.layer)), at.layer)

    def edits(self, role: str) -> bool:
        """Whether the inner method acts in places of this role."""
        return True

    # -- the inner method's ----------------------------------------------------------------------------

    @property
    def default_lr(self) -> float:
        inner: float = self.inner.default_lr
        return inner

    @property
    def names(self) -> Mapping[str, str]:
        return {**self.inner.names, **self.short_names}

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset(self.inner.fixed)

    @property
    def rates(self) -> Mapping[str, float]:
        return dict(self.inner.rates)

    def observes(self, role: str) -> Observation | None:
        return self.inner.observes(role) if self.edits(role) else None

    def informed(self, observed: Mapping[str, Sequence[Observed]]) -> Self:
        return self.replace(inner=self.inner.informed(observed))

    def plain(self) -> Method:
        return self.replace(inner=self.inner.plain())

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        inner = place is not None and self.edits(place.role)
        return dict(self.inner.plain_tensors(tensors, place)) if inner else dict(tensors)

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        return list(self.inner.place(anatomy))

    def at(self, path: str) -> Method:
        inner = self.inner.at(path)
        return self if inner is self.inner else self.replace(inner=inner)

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return dict(self.inner.tensors(layer, role)) if self.edits(role) else {}

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        return dict(self.inner.shared(anatomy, [p for p in places if self.edits(p.role)]))

    @property
    def counts_padding(self) -> bool:
        return bool(self.inner.counts_padding)

    @property
    def readies(self) -> bool:
        return bool(self.inner.readies)

    def ready(self, shared: Params, training: bool) -> Params:
        found: Params = self.inner.ready(shared, training)
        return found

    def before_step(self, sites: Sites) -> None:
        self.inner.before_step(_of_inner(sites))

    def after_step(self, sites: Sites, memory: dict[str, Tensor], progress: Progress) -> None:
        self.inner.after_step(_of_inner(sites), memory, progress)

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        return {**p, **self.inner.scaled(_without(p), weight, role)}

    # -- the edits -------------------------------------------------------------------------------------

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        found = self._edited("enter", self.inner.enter, p, x, at)
        return x if found is None else found

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        return self._edited("delta", self.inner.delta, p, x, at)

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        found = self._edited("leave", self.inner.leave, p, y, at)
        return y if found is None else found

    def _edited(
        self, hook: str, edit: Callable[..., Tensor | None], p: Params, value: Tensor, at: At
    ) -> Tensor | None:
        """One gated edit of a value; None where there is none."""
        if not self.edits(at.role) or not self.inner.overrides(hook):
            return None
        if at.gates is None:
            at.gates = self.decide(p, value, at)
        adds = hook == "delta"
        if self.skips and not at.training:
            return self._of_open(edit, _without(p), value, at, adds=adds)
        edited = edit(_without(p), value, at)
        if edited is None or edited is value:
            return edited
        gates = self.over(at.gates.to(edited.dtype), edited, at)
        return edited * gates if adds else edited * gates + value * (1 - gates)

    def _of_open(
        self, edit: Callable[..., Tensor | None], p: Params, value: Tensor, at: At, *, adds: bool
    ) -> Tensor | None:
        """The same where gates are 0 or 1: the inner method sees the open rows only."""
        gates = at.gates
        if gates is None:
            raise AssertionError("decided before")
        chosen = self.over(gates, value, at).flatten().nonzero()[:, 0]
        if chosen.shape[0] == value.shape[0]:
            return edit(p, value, at)
        given, at.x = at.x, at.x[chosen]
        edited = edit(p, value[chosen], at)
        at.x = given
        if edited is None:
            return None
        base = edited.new_zeros(value.shape[0], *edited.shape[1:]) if adds else value
        return base.index_copy(0, chosen, edited.to(base.dtype))


def straight_through(soft: Tensor) -> Tensor:
    """1 where ``soft`` is above one half and 0 elsewhere, exactly; its gradient is that of ``soft``."""
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def once(at: At, key: Any, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()`` of this owner's units: once per forward, and once per generation from its prompt.

    Where a block is recomputed it is computed again, once, so that gradients flow.
    """
    full = (at.name, at.part.owner, key)
    store = at.context.again if at.context.recomputing else at.memory
    if full not in store:
        if full not in at.memory:
            at.require_prompt()
        store[full] = compute()
    found: Tensor = store[full]
    return found


def most_used(usage_L: Tensor, count: int | None, among: Sequence[int] | None) -> tuple[int, ...]:
    """The ``count`` blocks used most; without a count those used more often than not, at least one."""
    blocks = range(len(usage_L)) if among is None else [index % len(usage_L) for index in among]
    ranked = sorted(blocks, key=lambda block: -float(usage_L[block]))
    often = [block for block in ranked if float(usage_L[block]) > 0.5] or ranked[:1]
    return tuple(sorted(often if count is None else ranked[:count]))


# -- what a gate reads --------------------------------------------------------------------------------


def width_seen(layer: Layer) -> int:
    """How many channels `seen` gives at a layer."""
    if isinstance(layer, ExpertLayer):
        return layer.width
    return layer.out_features if layer.kind in ("embedding", "sublayer") else layer.in_features


def seen(value: Tensor, at: At) -> Tensor:
    """What a gate reads at a site, channels last: the layer's input; the output of an embedding or a sub-layer."""
    if at.layer.kind == "sublayer":
        return value
    if at.layer.kind == "embedding":
        return at.layer.call(at.x)
    return to_last(at.x, at.layer)


def to_last(value: Tensor, layer: Layer) -> Tensor:
    """Channels as the last axis."""
    return value.movedim(1, -1) if _channels_first(layer) else value


def from_last(value: Tensor, layer: Layer) -> Tensor:
    """Channels where the layer has them."""
    return value.movedim(-1, 1) if _channels_first(layer) else value


def _channels_first(layer: Layer) -> bool:
    return layer.kind == "conv" or (isinstance(layer, NormLayer) and layer.channels_first)


def _without(p: Params) -> Params:
    return {short: tensor for short, tensor in p.items() if not short.startswith(OWN)}


def _of_inner(sites: Sites) -> dict[Place, Params]:
    found = {place: _without(params) for place, params in sites.items()}
    return {place: params for place, params in found.items() if params}
