"""Dense linear layers: ``nn.Linear`` and the ``Conv1D`` of GPT-2, whose weight is stored (in, out)."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from trimtab.frozen.layer import Layer, Push
from trimtab.kernels import products
from trimtab.kernels.lowrank import Frozen
from trimtab.kernels.sparse import sparse_linear


def push_identity(layer: Layer, push: Push) -> tuple[Tensor, Tensor]:
    """``(W', b')`` of any affine edit of a map from R^I to R^O: outputs at 0 and at each unit vector."""
    zero = torch.zeros(1, layer.in_features, dtype=layer.dtype, device=layer.device)
    eye = torch.eye(layer.in_features, dtype=layer.dtype, device=layer.device)
    bias_1O = push(layer, zero, None)
    return (push(layer, eye, None) - bias_1O).T.contiguous(), bias_1O[0]


class LinearMap(Layer):
    """What every linear layer shares, however its weight is stored: `dense` and `bias` are what differs."""

    kind = "linear"
    module: nn.Module

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)

    def sparse(self, x: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return sparse_linear(x, indices, values, self.out_features)

    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        return push_identity(self, push)

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        new = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight)
        if bias is not None:
            new.bias = nn.Parameter(bias)
        return new


class _Linear(LinearMap):
    """A linear layer whose module holds one dense weight."""

    @property
    @abstractmethod
    def _weight(self) -> Tensor: ...

    def product_of(self, x: Tensor) -> Frozen | None:
        dtype = products.autocast_dtype(x) or x.dtype
        if not bare(self.module) or dtype != self.dtype:
            return None
        return Frozen(self.dense(), self.bias())

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device


def bare(module: nn.Module) -> bool:
    """Whether calling a layer is no more than its product, and its tensors are frozen and what they look like."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    return (
        not any(hooks)
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and all(type(t) in (Tensor, nn.Parameter) and not t.requires_grad for t in held)
    )


def hidden(weight: Tensor) -> bool:
    """Whether a tensor only stands for values that it holds in another form, as torchao's do; torch's own kinds, such
    as a shard of FSDP's, hold them."""
    return is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith(
        "torch."
    )


SAME_MAP = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
"""Subclasses of ``nn.Linear`` with a forward of their own that computes the same."""


class LinearLayer(_Linear):
    """``nn.Linear``, and subclasses that keep its forward or compute the same."""

    module: nn.Linear

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.in_features = module.in_features
        self.out_features = module.out_features

    @classmethod
    def view(cls, module: nn.Module) -> LinearLayer | None:
        if not isinstance(module, nn.Linear):
            return None
        weight = getattr(module, "weight", None)  # a package that packs it may take it away
        if weight is None or hidden(weight):
            return None
        kind = type(module)
        plain = kind.forward is nn.Linear.forward
        return cls(module) if plain or f"{kind.__module__}.{kind.__name__}" in SAME_MAP else None

    @property
    def _weight(self) -> Tensor:
        return self.module.weight

    def dense(self) -> Tensor:
        return self.module.weight

    def bias(self) -> Tensor | None:
        return self.module.bias


class Conv1DLayer(_Linear):
    """The ``Conv1D`` of transformers: a linear layer with a transposed weight."""

    transposed = True
    module: Conv1D

    def __init__(self, module: Conv1D) -> None:
        self.module = module
        self.in_features, self.out_features = module.weight.shape

    @classmethod
    def view(cls, module: nn.Module) -> Conv1DLayer | None:
        return cls(module) if isinstance(module, Conv1D) else None

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.module.weight
        return weight

    def dense(self) -> Tensor:
        return self._weight.T

    def orient(self, stored: Tensor) -> Tensor:
        return stored.T

    def bias(self) -> Tensor | None:
        bias: Tensor = self.module.bias
        return bias

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        new = Conv1D(self.out_features, 0)
        new.weight = nn.Parameter(weight.T.contiguous())
        new.bias = nn.Parameter(weight.new_zeros(self.out_features) if bias is None else bias)
        return new
