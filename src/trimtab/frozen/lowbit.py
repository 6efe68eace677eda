"""Linear layers whose frozen weight is stored in few bits: what all formats share.

    y = x Ŵᵀ + b,    dx = dy Ŵ

Ŵ is made dense for each product and dropped again: backward keeps nothing but the layer itself, and makes Ŵ anew.
There is no gradient for W. A format is one class: how it makes a stored weight of a dense one, and back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import UnsupportedError
from trimtab.frozen.linear import LinearMap


class LowBitLinear(nn.Module):
    """A frozen linear layer in few bits. Abstract; its buffers are the stored weight."""

    kind: str
    """The name of the format."""
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight Ŵ_OI as a dense tensor."""

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        stored = sum(8 * buffer.numel() * buffer.element_size() for buffer in self.buffers())
        return stored / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = _Frozen.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y

    def _hold(self, bias: Tensor | None) -> None:
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> LowBitLinear:
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

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.bits:.2f} bits"


class _Frozen(torch.autograd.Function):
    """x Ŵᵀ + b, which remembers the layer and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: LowBitLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        dx, db = ctx.needs_input_grad[:2]
        return (
            grad @ ctx.module.dense(grad.dtype) if dx else None,
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

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype

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
        raise UnsupportedError(
            f"{type(self.module).__name__}: a weight in few bits cannot be trained itself. Adapt the layer, or leave "
            "it out when the base is loaded in few bits."
        )
