"""Activations that kernels of ours compute, recognised by what they are.

    silu        x · σ(x)
    gelu        x · (1 + erf(x / √2)) / 2
    gelu_tanh   x · (1 + tanh z) / 2 = x · σ(2 z),   z = √(2/π) · (x + 0.044715 x³)

To torch each is one operation, which computes in fp32 and rounds once. Families that write one out round after each of
its operations: theirs is none of these.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import nn

Kind = Literal["silu", "gelu", "gelu_tanh"]

_SILU = ("SiLU", "SiLUActivation")
_AROUND = ("GELUActivation", "GELUTanh", "PytorchGELUTanh")
"""Of transformers, around a function that is torch's or written out."""


def kind_of(activation: object) -> Kind | None:
    """Which of them a module or a function computes, if any."""
    if activation is F.silu:
        return "silu"
    if activation is F.gelu:
        return "gelu"
    if isinstance(activation, partial):
        tanh = activation.func is F.gelu and not activation.args
        return "gelu_tanh" if tanh and activation.keywords == {"approximate": "tanh"} else None
    return _of_module(activation) if isinstance(activation, nn.Module) else None


def _of_module(module: nn.Module) -> Kind | None:
    name, options = type(module).__name__, module.__dict__
    if name in _SILU:
        return None if options.get("inplace") else "silu"
    if name in _AROUND:
        return kind_of(options.get("act"))
    if name != "GELU":
        return None
    kinds: dict[object, Kind] = {"none": "gelu", "tanh": "gelu_tanh"}
    return kinds.get(options.get("approximate"))
