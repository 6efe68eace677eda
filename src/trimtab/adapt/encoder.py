"""Encoders of virtual tokens: in training a table is made from a smaller or freer one; what is shared is the table.

Tensors are named as PEFT names them in memory (``prompt_encoder.mlp_head.0.weight``), and are known to methods by
those very names, so that what trains and what a file holds go through the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.contract import Init, Params, Spec, kaiming_uniform

TABLE = "prompt_encoder.embedding.weight"
"""The table itself, and what an encoder begins with. (length, width)"""


def table(shape: tuple[int, ...], init: Init) -> dict[str, Spec]:
    """The table."""
    return {TABLE: Spec(TABLE, shape, init)}


def mlp_specs(head: str, sizes: Sequence[int]) -> dict[str, Spec]:
    """Linear layers between these widths, at ``head.0``, ``head.2``, …: an activation takes each number between."""
    specs: dict[str, Spec] = {}
    for number, (narrow, wide) in enumerate(pairwise(sizes)):
        name = f"prompt_encoder.{head}.{2 * number}"
        specs[f"{name}.weight"] = Spec(f"{name}.weight", (wide, narrow), kaiming_uniform)
        specs[f"{name}.bias"] = Spec(f"{name}.bias", (wide,), _uniform(narrow**-0.5))
    return specs


def mlp(shared: Params, head: str, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The layers of `mlp_specs`, with the activation between them."""
    number = 0
    while (name := f"prompt_encoder.{head}.{number}") + ".weight" in shared:
        x = activation(x) if number else x
        x = F.linear(x, shared[f"{name}.weight"], shared[f"{name}.bias"])
        number += 2
    return x


def lstm_specs(head: str, width: int, hidden: int, layers: int) -> dict[str, Spec]:
    """A bidirectional LSTM, ``hidden`` wide in each direction."""
    specs = {}
    for name, shape in _lstm_shapes(width, hidden, layers).items():
        slot = f"prompt_encoder.{head}.{name}"
        specs[slot] = Spec(slot, shape, _uniform(hidden**-0.5))
    return specs


def lstm(shared: Params, head: str, x: Tensor, layers: int) -> Tensor:
    """(n, 2 · hidden) of (n, width), by the LSTM of `lstm_specs`."""
    hidden = shared[f"prompt_encoder.{head}.weight_hh_l0"].shape[1]
    names = _lstm_shapes(x.shape[1], hidden, layers)
    weights = [shared[f"prompt_encoder.{head}.{name}"] for name in names]
    start = x.new_zeros(2 * layers, 1, hidden)
    states: Tensor = torch.lstm(
        x[:, None], (start, start), weights, True, layers, 0.0, False, True, False
    )[0]
    return states[:, 0]


def _lstm_shapes(width: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        given = width if layer == 0 else 2 * hidden
        for direction in ("", "_reverse"):
            end = f"l{layer}{direction}"
            shapes |= {
                f"weight_ih_{end}": (4 * hidden, given),
                f"weight_hh_{end}": (4 * hidden, hidden),
                f"bias_ih_{end}": (4 * hidden,),
                f"bias_hh_{end}": (4 * hidden,),
            }
    return shapes


def _uniform(bound: float) -> Init:
    """U(±bound): what the biases of a linear layer start from, and all of an LSTM."""
    return lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound
