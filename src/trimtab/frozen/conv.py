"""Dense convolutions in one, two and three dimensions, grouped ones included. Canonical W_OIK is torch's."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.frozen.layer import Layer, Push

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class ConvLayer(Layer):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``."""

    kind = "conv"

    module: Conv

    def __init__(self, module: Conv) -> None:
        self.module = module
        self.in_features = module.in_channels
        self.out_features = module.out_channels
        self.dims = len(module.kernel_size)
        self.zero_padded = module.padding_mode == "zeros"
        plain = module.groups == 1 and set(module.dilation) == {1} and self.zero_padded
        # its factors have none of the three, and those without groups cannot merge
        self.other_in_peft = "" if plain else "it leaves out groups, dilation and padding modes"
        sizes = (module.kernel_size, module.stride, module.padding)
        self.even = all(len(set(each)) == 1 for each in sizes) and not isinstance(
            module.padding, str
        )

    @classmethod
    def view(cls, module: nn.Module) -> ConvLayer | None:
        plain = isinstance(module, Conv) and type(module).forward in _PLAIN
        return cls(module) if plain and isinstance(module, Conv) else None

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def dense(self) -> Tensor:
        return self.module.weight

    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.module.weight.shape)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.module
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        padding = m.padding if m.padding_mode == "zeros" else 0
        y: Tensor = _FUNCTIONS[self.dims](x, weight, None, m.stride, padding, m.dilation, m.groups)
        return y

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A is a convolution to ``rank`` channels with the layer's kernel, B one of size 1 (as PEFT's)."""
        ones = (1,) * self.dims
        per_group = self.in_features // self.module.groups
        return (rank, per_group, *self.module.kernel_size), (
            self.out_features,
            rank // self._groups(rank),
            *ones,
        )

    def lowrank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = _FUNCTIONS[self.dims](self.apply(x, a), b, groups=self._groups(a.shape[0]))
        return y

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        groups = self._groups(a.shape[0])
        a_GRK = a.reshape(groups, a.shape[0] // groups, -1)
        b_GOR = b.reshape(groups, self.out_features // groups, -1)
        return torch.bmm(b_GOR, a_GRK).reshape(self.module.weight.shape)

    def over_in(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * self.dims)

    def over_out(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * self.dims)

    def probe(self, push: Push) -> tuple[Tensor, Tensor | None]:
        """Push unit impulses through the same kernel without stride, padding or dilation."""
        bare = copy.copy(self.module)
        bare.__dict__.update(
            stride=(1,) * self.dims, padding=(0,) * self.dims, dilation=(1,) * self.dims
        )
        bare.__dict__.update(
            padding_mode="zeros", _reversed_padding_repeated_twice=(0, 0) * self.dims
        )
        layer = ConvLayer(bare)
        size = self.in_features * int(torch.tensor(self.module.kernel_size).prod())
        shape = (self.in_features, *self.module.kernel_size)
        eye = torch.eye(size, dtype=self.dtype, device=self.device).reshape(size, *shape)
        bias_O = push(layer, eye.new_zeros(1, *shape), None).reshape(self.out_features)
        w_OIK = (push(layer, eye, None).reshape(size, self.out_features) - bias_O).T
        per_group = w_OIK.reshape(
            self.module.groups, -1, self.module.groups, size // self.module.groups
        )
        weight = torch.stack([per_group[g, :, g] for g in range(self.module.groups)])
        return weight.reshape(self.module.weight.shape).contiguous(), bias_O

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        new = copy.copy(self.module)
        new._parameters = {
            "weight": nn.Parameter(weight),
            "bias": None if bias is None else nn.Parameter(bias),
        }
        return new

    def _groups(self, rank: int) -> int:
        """A grouped layer stays grouped where the rank allows it; each group then has its own factors."""
        groups = int(self.module.groups)
        if rank % groups:
            raise ValueError(f"rank {rank} is not a multiple of the convolution's {groups} groups")
        return groups
