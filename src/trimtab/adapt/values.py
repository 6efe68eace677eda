"""Initial values: called with a shape and a generator; their docstrings are what `trimtab methods show` says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Makes the initial value (fp32, on CPU) of a tensor of that shape."""


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """All zeros."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """All ones."""
    return torch.ones(shape)


def constant(value: float) -> Init:
    """All one value."""
    return lambda shape, generator: torch.full(shape, value)


def normal(std: float) -> Init:
    """N(0, std²)."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def truncated_normal(std: float) -> Init:
    """N(0, std²) cut at two standard deviations."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.nn.init.trunc_normal_(
            torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator
        )

    return init


def uniform(bound: float) -> Init:
    """U(±bound)."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound


def uniform_from_zero(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(0, 1)."""
    return torch.rand(shape, generator=generator)


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(±1/√fan_in): what ``nn.Linear`` and LoRA's A start from."""
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    bound = fan_in**-0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def copy_of(tensor: Tensor) -> Init:
    """Starts as a copy (a frozen head that is to be trained)."""
    return lambda shape, generator: tensor.detach().float().cpu().reshape(shape).clone()
