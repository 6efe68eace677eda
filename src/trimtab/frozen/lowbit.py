"""Linear layers whose frozen weight is stored in few bits: what all formats share.

    y = x Ŵᵀ + b,    dx = dy Ŵ

Ŵ is made dense for each product and dropped again: backward keeps nothing but the layer itself, and makes Ŵ anew.
There is no gradient for W. A format is one class: how it makes a stored weight of a dense one, and back.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import ModelError, UnsupportedError
from trimtab.frozen.linear import LinearMap, bare
from trimtab.kernels import products
from trimtab.kernels.lowrank import Frozen


class LowBit(nn.Module):
    """A module whose frozen weights are stored in few bits. Abstract; the stored weights are buffers."""

    kind: str
    """The name of the format."""
    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def weights(self) -> int:
        """How many values the stored weights stand for."""

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        stored = sum(8 * buffer.numel() * buffer.element_size() for buffer in self.buffers())
        return stored / self.weights

    def _apply(self, fn: Any, recurse: bool = True) -> LowBit:
        """``.to(dtype)`` changes what it computes in, never the stored scales."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        probe = fn(torch.empty(0, dtype=self.compute_dtype))
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


class LowBitLinear(LowBit):
    """A frozen linear layer in few bits. Abstract; its buffers are the stored weight."""

    bias: Tensor | None
    made: str = ""
    """The storage that the weight was rounded for, where that says more than the format."""
    was: str = ""
    """The sample of the weight that it was made of, where its codes are not the same on every machine."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype

    @property
    def storage(self) -> str:
        """How the weight came to be stored, as `trimtab.load` takes it."""
        return self.made or self.kind

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight Ŵ_OI as a dense tensor."""

    def like(self, weight: Tensor, bias: Tensor | None) -> LowBitLinear:
        """Another dense weight of this shape, rounded into just this format."""
        raise UnsupportedError(
            f"Trimtab reads weights in {self.kind}, and does not round into it; merge into dense weights."
        )

    def shifted(self, change_OI: Tensor, bias: Tensor | None) -> LowBitLinear | None:
        """The weight with a change added that this format holds exactly; None where it does not."""
        if bool(change_OI.any()):
            return None
        same = copy.deepcopy(self)
        same._hold(bias)
        return same

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _Frozen.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    def _hold(self, bias: Tensor | None) -> None:
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.bits:.2f} bits"


def check_weight(weight: Tensor) -> None:
    """Raise `ModelError` for what no format holds: NaN, infinities, numbers that are in few bits already."""
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ModelError(
            f"the weight is {str(weight.dtype).removeprefix('torch.')}; only floating values of 16 bits or more are "
            "rounded. Is it in few bits already?"
        )
    if weight.is_meta or not weight.numel():
        return
    if not bool(torch.stack(torch.aminmax(weight.detach())).float().isfinite().all()):
        wrong = int((~weight.detach().float().isfinite()).sum())
        raise ModelError(
            f"{wrong:,} of {weight.numel():,} values of the weight are NaN, infinite or beyond float32, and a scale of "
            "its block would be so too. Download the model again, or mend it."
        )


class _Frozen(torch.autograd.Function):
    """x Ŵᵀ + b, which remembers the layer and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: LowBitLinear) -> Tensor:
        ctx.module = module
        y = products.linear(x.reshape(-1, x.shape[-1]), module.dense(x.dtype), bias)
        # no view, which autograd would forbid to be written in place (Falcon adds to it so)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], module.out_features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        dx, db = ctx.needs_input_grad[:2]
        return (
            products.times(grad, ctx.module.dense(grad.dtype)) if dx else None,
            grad.sum_to_size(grad.shape[-1:]) if db else None,
            None,
        )


class LowBitLayer(LinearMap):
    """The view of such a layer."""

    module: LowBitLinear
    rounded = True

    def __init__(self, module: LowBitLinear) -> None:
        self.module = module
        self.in_features = module.in_features
        self.out_features = module.out_features

    @classmethod
    def view(cls, module: nn.Module) -> LowBitLayer | None:
        return cls(module) if isinstance(module, LowBitLinear) else None

    def product_of(self, x: Tensor) -> Frozen | None:
        module = self.module
        plain = type(module).forward is LowBitLinear.forward and bare(module)
        if not plain or (products.autocast_dtype(x) or x.dtype) != x.dtype:
            return None
        return Frozen(module.dense, module.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype

    @property
    def storage(self) -> str:
        return self.module.storage

    @property
    def device(self) -> torch.device:
        return next(buffer.device for buffer in self.module.buffers())

    def dense(self) -> Tensor:
        return self.module.dense(self.dtype)

    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return None if bias is None else bias.to(self.dtype)

    def holding(self) -> Iterable[Tensor]:
        return self.module.buffers()

    def stored(self) -> dict[str, Tensor]:
        raise untrained(self.module)


def untrained(module: nn.Module) -> UnsupportedError:
    """Why a weight in few bits is not itself trained."""
    return UnsupportedError(
        f"{type(module).__name__}: a weight in few bits cannot be trained itself. Adapt the layer, or leave it out "
        "when the base is loaded in few bits."
    )
