"""Small networks put into a frozen model, shared by the methods that are made of them.

    y' = y + change(y),        change(h) = s · ( W_up σ(W_down h + b_down) + b_up )

`Sized` has the fields of a narrow middle, `MLP` the two dense matrices, and `Inserted` the edit: of a layer's
output, or (role ``norm``) of what goes into a norm, whose own result the network reads: x' = x + change(norm(x)).
In a convolution's output the network acts on the channels of each position.

Shapes: C is the width, M the narrow middle. down_MC, b_down_M, up_CM, b_up_C; s has one value, or C.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.contract import At, Init, Layer, Method, Params, Spec, zeros
from trimtab.errors import UnsupportedError

Activation = Literal["gelu", "relu", "silu", "tanh"]
NORM = "norm"
"""Role of a norm before which `Inserted` acts."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Sized(Method):
    """Fields of a narrow middle: its ``size``, or ``reduction``: the width divided by it."""

    size: int | None = Field(default=None, ge=1)
    """Width of the middle, instead of ``reduction``."""
    reduction: int | None = Field(default=None, ge=1)
    """The width divided by it is the size of the middle, instead of ``size``."""
    activation: Activation = "gelu"
    """The σ between the two maps."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        """The one that is given puts the other's default out of force."""
        for given, other in (("size", "reduction"), ("reduction", "size")):
            if values.get(given) is not None and other not in values:
                return {**values, other: None}
        return values

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.size is None) == (self.reduction is None):
            raise ValueError("give either size or reduction")
        return self

    def replace(self, **changes: Any) -> Self:
        for given, other in (("size", "reduction"), ("reduction", "size")):
            if changes.get(given) is not None and other not in changes:
                changes = {**changes, other: None}
        return super().replace(**changes)

    def size_at(self, width: int) -> int:
        """The size in a layer of this width."""
        if self.size is not None:
            return self.size
        return max(width // (self.reduction or 1), 1)

    def active(self, x: Tensor) -> Tensor:
        """σ(x)."""
        return ACTIVATIONS[self.activation](x)


class MLP(Sized):
    """Two dense matrices with biases, and perhaps a trained scale ``s``."""

    short_names: ClassVar[Mapping[str, str]] = {
        "adapter_down.weight": "down", "adapter_down.bias": "b_down",
        "adapter_up.weight": "up", "adapter_up.bias": "b_up", "adapter_scale": "s",
    }  # fmt: skip
    inits: ClassVar[tuple[Init, Init]]
    """First values of W_down and of W_up."""

    @property
    def factor(self) -> float:
        """A fixed scale beside the trained one."""
        return 1.0

    def downward(self, width: int) -> dict[str, Spec]:
        """What `inner` needs."""
        size = self.size_at(width)
        return {
            "down": Spec("adapter_down.weight", (size, width), self.inits[0]),
            "b_down": Spec("adapter_down.bias", (size,), zeros),
        }

    def upward(self, width: int) -> dict[str, Spec]:
        """What `outer` needs."""
        return {
            "up": Spec("adapter_up.weight", (width, self.size_at(width)), self.inits[1]),
            "b_up": Spec("adapter_up.bias", (width,), zeros),
        }

    def inner(self, p: Params, h: Tensor) -> Tensor:
        """σ(W_down h + b_down)."""
        return self.active(F.linear(h, p["down"], p["b_down"]))

    def outer(self, p: Params, z: Tensor) -> Tensor:
        """s · (W_up z + b_up)."""
        out = F.linear(z, p["up"], p["b_up"])
        if "s" in p:
            out = out * p["s"]
        return out if self.factor == 1.0 else out * self.factor

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        changed = {short: p[short] * weight for short in ("up", "b_up") if short in p}
        return {**p, **changed}

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """Networks side by side: exact, with every scale folded into W_up and b_up."""
        given = [(method, p) for method, p in parts if isinstance(method, MLP)]
        if any(method.activation != self.activation for method, _ in given):
            raise UnsupportedError(
                f"{self.kind}: networks with different activations have no sum of the same kind."
            )
        joined: dict[str, Tensor] = {}
        if "down" in given[0][1]:
            joined["down"] = torch.cat([p["down"] for _, p in given], dim=-2)
            joined["b_down"] = torch.cat([p["b_down"] for _, p in given], dim=-1)
            size = joined["b_down"].shape[-1]
        if "up" in given[0][1]:
            scales = [p.get("s", torch.ones(1)) * (m.factor / self.factor) for m, p in given]
            ups = [p["up"] * s.unsqueeze(-1) for s, (_, p) in zip(scales, given, strict=True)]
            biases = [p["b_up"] * s for s, (_, p) in zip(scales, given, strict=True)]
            joined |= {"up": torch.cat(ups, dim=-1), "b_up": torch.stack(biases).sum(0)}
            size = joined["up"].shape[-1]
            if "s" in given[0][1]:
                joined["s"] = torch.ones_like(given[0][1]["s"])
        return self.replace(size=size), joined


class Inserted(Method):
    """Adds ``change`` of a layer's output to it."""

    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "it passes hidden states through a non-linear activation"

    @abstractmethod
    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        """What is added, from h_..C; ``p`` holds this site's tensors and the whole adapter's."""

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        axis = channel_axis(at.layer)
        return y + self.change({**at.shared, **p}, y.movedim(axis, -1), at).movedim(-1, axis)


class BeforeNorm(Inserted):
    """Where its role is ``norm`` it reads what the norm gives, and adds the change before the norm."""

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        if at.role != NORM:
            return x
        return x + self.change({**at.shared, **p}, at.layer.call(x), at)

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return y if at.role == NORM else super().leave(p, y, at)


class InsertedMLP(Inserted, MLP):
    """`MLP` as the change."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        width = width_of(layer)
        return {**self.downward(width), **self.upward(width)}

    def change(self, p: Params, h: Tensor, at: At) -> Tensor:
        return self.outer(p, self.inner(p, h))


def width_of(layer: Layer) -> int:
    """The width of the hidden states that a layer gives.

    Raises:
        UnsupportedError: it is not known, or the layer's output has no axis of channels.
    """
    if layer.out_features == 0:
        raise UnsupportedError(
            f"{type(layer.module).__name__} gives hidden states whose width no config tells; "
            "target a layer with a weight."
        )
    channel_axis(layer)
    return layer.out_features


def channel_axis(layer: Layer) -> int:
    """The axis of the channels in a layer's output: the last, or that before the positions."""
    return -layer.over_out(torch.empty(layer.out_features, device="meta")).dim()
