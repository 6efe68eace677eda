"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): train the biases alone.

    y = f(x) + Δb,   Δb starts at 0

A change beside the frozen bias instead of the bias itself: the base stays as it is, and rows with
different adapters share a batch. A base without any bias gets one on every linear layer of its blocks.
With ``copies`` the biases b' themselves are the tensors, y = f(x) + (b' − b), and those of the head are among them:
it is the part of another method that PEFT's option ``bias`` asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

from torch import Tensor

from trimtab.adapt.biases import DISK, SLOTS, bias_roles, bias_spec, biased, with_bias
from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, zeros
from trimtab.errors import TargetError, UnsupportedError
from trimtab.models.anatomy import Anatomy


@final
class BitFit(Method):
    """``BitFit()``: all biases outside the head; ``targets`` narrows them (and adds missing ones)."""

    kind: ClassVar[str] = "bitfit"
    lr: ClassVar[float] = 1e-3
    disk: ClassVar[Mapping[str, str]] = DISK
    short_names: ClassVar[Mapping[str, str]] = {
        "bitfit_bias": "b", **dict.fromkeys(SLOTS.values(), "bias"),
    }  # fmt: skip
    scales: ClassVar[str] = "b"
    adds: ClassVar[bool] = True

    @property
    def names(self) -> Mapping[str, str]:
        copied = self.copies != "none"
        return {
            slot: n for slot, n in self.short_names.items() if (slot in SLOTS.values()) == copied
        }

    copies: Literal["none", "targets", "all"] = "none"
    """Train copies of the biases that there are: those of the targets, or all, whatever the targets."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        if self.copies != "none":
            return self._copied(anatomy)
        if self.targets:
            return super().place(anatomy)
        biased = tuple(path for path in anatomy.biased if path not in anatomy.head)
        if biased:
            narrowed = anatomy.select(biased, self.exclude, self.layers)
            return [Place(path) for path in narrowed]
        linears = tuple(path for path in anatomy.linears if path not in anatomy.experts)
        return [Place(path) for path in anatomy.select(linears, self.exclude, self.layers)]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if layer.kind == "sublayer":
            raise UnsupportedError(
                "BitFit adds to a layer's bias; a sub-layer without a weight has none."
            )
        if role:
            return {"bias": bias_spec(layer, role)}
        return {"b": Spec("bitfit_bias", (layer.out_features,), zeros)}

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return with_bias(p["bias"], y, at) if at.role else y + at.layer.over_out(p["b"])

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        self._check_changes()
        return super().scaled(p, weight, role)

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        self._check_changes()
        return super().sum(parts, role)

    def roles_in_file(self, path: str, slots: Mapping[str, Any]) -> tuple[str, ...]:
        return bias_roles(slots) or super().roles_in_file(path, slots)

    def _copied(self, anatomy: Anatomy) -> list[Place]:
        chosen = anatomy.select(self.targets, self.exclude, self.layers) if self.targets else []
        every = self.copies == "all"
        found = biased(anatomy, every=every, adapted=chosen, train=self.train)
        if not found:
            where = "this model" if every else "the targets"
            raise TargetError(
                f"no layer of {where} has a bias to be trained; leave bias at 'none'."
            )
        return found

    def _check_changes(self) -> None:
        if self.copies != "none":
            raise UnsupportedError(
                "biases that are trained as copies have no sums and no multiples; train changes of them (bitfit)."
            )
