"""Normalisation layers: ``y = norm(x) · w + b``, elementwise over the channels.

The normalised value, not x, is what the affine part acts on; so only edits of the output can merge.
Some store w less one (Gemma: ``norm(x) · (1 + w)``); the canonical weight is what is multiplied by.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.errors import NotMergeableError, UnsupportedError
from trimtab.frozen.layer import Layer, Push, no_factors


class NormLayer(Layer):
    """LayerNorm, BatchNorm, GroupNorm, InstanceNorm, and any ``*Norm`` whose only weight is a vector."""

    kind = "norm"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = module._parameters["weight"]
        if weight is None:
            raise UnsupportedError(f"{type(module).__name__} has no weight to adapt.")
        self.in_features = self.out_features = weight.shape[0]
        self.offset = _offset(module)
        self.channels_first = isinstance(
            module, nn.modules.batchnorm._NormBase | nn.GroupNorm
        )  # BatchNorm and InstanceNorm share that base

    @classmethod
    def view(cls, module: nn.Module) -> NormLayer | None:
        weight = module._parameters.get("weight")
        named = type(module).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))
        return cls(module) if named and weight is not None and weight.dim() == 1 else None

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def dense(self) -> Tensor:
        return self.orient(self._weight)

    def orient(self, stored: Tensor) -> Tensor:
        return stored if self.offset == 0 else self.wide(stored) + self.offset

    @property
    def _weight(self) -> Tensor:
        weight = self.module._parameters["weight"]
        if weight is None:
            raise AssertionError("checked in __init__")
        return weight

    def bias(self) -> Tensor | None:
        return self.module._parameters.get("bias")

    @property
    def shape(self) -> tuple[int, ...]:
        raise no_factors("norm")

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise no_factors("norm")

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise no_factors("norm")

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise no_factors("norm")

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def over_in(self, v: Tensor) -> Tensor:
        return self.over_out(v)

    def over_out(self, v: Tensor) -> Tensor:
        if not self.channels_first:
            return v
        spatial = {"1d": 1, "2d": 2, "3d": 3}.get(type(self.module).__name__[-2:])
        if spatial is None or type(self.module).__name__ == "BatchNorm1d":
            raise UnsupportedError(
                f"the number of spatial axes after the channels of {type(self.module).__name__} varies; "
                "adapt the convolution beside it instead."
            )
        return v.reshape(-1, *(1,) * spatial)

    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        """Output edits only: where norm(x) is 0 the output is the bias, where it is 1 it is w + b."""
        bias = self.bias()
        zero = torch.zeros_like(self.dense()) if bias is None else bias
        shape = self.over_out(zero).shape
        x = zero.new_zeros(1, *shape)
        at_zero = push(self, x, zero.reshape(1, *shape)).flatten()
        at_one = push(self, x, (self.dense() + zero).reshape(1, *shape)).flatten()
        return at_one - at_zero, at_zero

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if bias is not None and "bias" not in self.module._parameters:
            raise NotMergeableError(
                f"{type(self.module).__name__} has no bias, and the merged layer would need one. "
                "Keep the adapter unmerged, or leave these norms out of its targets."
            )
        new = copy.copy(self.module)
        new._parameters = dict(self.module._parameters)
        new._parameters["weight"] = nn.Parameter(weight - self.offset if self.offset else weight)
        if bias is not None:
            new._parameters["bias"] = nn.Parameter(bias)
        return new


_OFFSETS: dict[type[nn.Module], int] = {}


def _offset(module: nn.Module) -> int:
    """1 where a norm multiplies by one more than its weight: its output is then not zero at weight zero."""
    kind = type(module)
    if not kind.__name__.endswith("RMSNorm") or kind is nn.RMSNorm:
        return 0
    if kind not in _OFFSETS:
        x = torch.ones(1, cast(Tensor, module.weight).shape[0], device="cpu")
        with torch.no_grad():
            y: Tensor = functional_call(module, {"weight": torch.zeros_like(x[0])}, (x,))
        _OFFSETS[kind] = int(bool(y.abs().max() > 0.5))
    return _OFFSETS[kind]
