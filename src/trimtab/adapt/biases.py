"""Biases that are trained beside a method's own tensors: PEFT's option ``bias``.

    y = f(x) + (b' − b),   b' starts as a copy of the frozen bias b

The base stays as it is. In a file the biases have the names that they have in PEFT's model, where the bias of a
target lies in its ``base_layer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Place, Spec, copy_of
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy

INNER, OWN = "bias-of-target", "bias"
BIASES = (INNER, OWN)
"""Roles of a site where a bias is trained: of a layer that has tensors of the method too, or of another."""
SLOTS: Mapping[str, str] = {INNER: "lora_bias.inner", OWN: "lora_bias.own"}
DISK: Mapping[str, str] = {SLOTS[INNER]: "base_layer.bias", SLOTS[OWN]: "bias"}


def biased(
    anatomy: Anatomy, *, every: bool, adapted: Sequence[str], train: Sequence[str]
) -> list[Place]:
    """Where biases are trained: of the adapted layers, or of all but those in modules that are trained in full."""
    inside = set(adapted)
    if every:
        whole = anatomy.select(train) if train else []
        below = tuple(f"{path}." for path in whole)
        found = [p for p in anatomy.biased if p not in whole and not p.startswith(below)]
    else:
        found = [path for path in anatomy.biased if path in inside]
    return [Place(path, INNER if path in inside else OWN) for path in found]


def bias_spec(layer: Layer, role: str) -> Spec:
    """The copy of a layer's bias."""
    bias = layer.bias()
    if bias is None:
        raise TargetError("a bias was asked for on a layer that has none.")
    return Spec(SLOTS[role], tuple(bias.shape), copy_of(bias))


def with_bias(bias: Tensor, y: Tensor, at: At) -> Tensor:
    """y with another bias than the layer's own."""
    base = at.layer.bias()
    return y + at.layer.over_out(bias if base is None else bias - base.to(bias.dtype))


def bias_roles(slots: Mapping[str, Any]) -> tuple[str, ...]:
    """The roles that the slots of a site in a file tell."""
    return tuple(role for role in BIASES if SLOTS[role] in slots)


class Biased(Method):
    """A method of layers beside which biases can be trained; its part that trains them is a `BitFit` of copies."""

    called: ClassVar[str] = ""
    """What PEFT's word for the biases of the targets begins with, where that is not the method's kind."""

    bias: Literal["none", "targets", "all"] = "none"
    """Train biases too: those of the targets, or all."""

    @property
    def members(self) -> tuple[Method, ...]:
        if self.bias == "none":
            return (self,)
        from trimtab.adapt.parse import methods

        where = {name: dict(self)[name] for name in ("targets", "exclude", "layers", "train")}
        drop = {"layer_drop": self.layer_drop}
        beside = methods.get("bitfit").parse({"copies": self.bias, **where, **drop})
        return (self.replace(bias="none"), beside)

    def remade(self, members: Sequence[Method]) -> Method:
        first, *beside = members
        return first.replace(bias=self.bias) if beside else first

    def pace(self, part: Method) -> float:
        return 1.0

    @property
    def peft_parts(self) -> int:
        return 1

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        return super().in_peft(anatomy, [p for p in places if p.role not in BIASES])

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        word = f"{self.called or self.kind}_only" if self.bias == "targets" else self.bias
        return {**super().to_peft(places), **({} if self.bias == "none" else {"bias": word})}

    def aimed(self, places: Sequence[Place]) -> Self:
        return super().aimed([place for place in places if place.role not in BIASES])
