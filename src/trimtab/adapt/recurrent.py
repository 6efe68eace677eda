"""A small network that goes from site to site in the order of execution, carrying a state.

With gradient checkpointing a site computes again from the state that it was given in the forward. In a
generation a site keeps what it found in the prompt.

Shapes: U units (sequences) or any positions, K width of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.adapt.at import At
from trimtab.adapt.contract import Spec, constant, kaiming_uniform, zeros
from trimtab.errors import UnsupportedError

State = tuple[Tensor, Tensor]
SHORT_NAMES = {
    "gate.read.weight": "gate_read", "gate.read.bias": "gate_b_read",
    "gate.write.weight": "gate_write", "gate.write.bias": "gate_b_write",
    "gate.cell.weight_ih": "gate_ih", "gate.cell.weight_hh": "gate_hh",
    "gate.cell.bias_ih": "gate_b_ih", "gate.cell.bias_hh": "gate_b_hh",
}  # fmt: skip


def site_specs(features: int, width: int, outputs: int, start: float) -> dict[str, Spec]:
    """The tensors at one site: features -> K, and K -> outputs, which all begin at ``start``."""
    return {
        "gate_read": Spec("gate.read.weight", (width, features), kaiming_uniform),
        "gate_b_read": Spec("gate.read.bias", (width,), zeros),
        "gate_write": Spec("gate.write.weight", (outputs, width), zeros),
        "gate_b_write": Spec("gate.write.bias", (outputs,), constant(start)),
    }


def lstm_specs(width: int) -> dict[str, Spec]:
    """The tensors of an LSTM from K to K, as torch lays them out: 8 K² + 8 K values."""
    bound = width**-0.5

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound

    shapes = {
        "ih": (4 * width, width),
        "hh": (4 * width, width),
        "b_ih": (4 * width,),
        "b_hh": (4 * width,),
    }
    slots = {short.removeprefix("gate_"): slot for slot, short in SHORT_NAMES.items()}
    return {f"gate_{name}": Spec(slots[name], shape, init) for name, shape in shapes.items()}


def lstm(x: Tensor, state: State, w: Mapping[str, Tensor]) -> State:
    """One step: ``torch.nn.LSTMCell``, for any leading axes."""
    h, c = state
    i, f, g, o = (F.linear(x, w["ih"], w["b_ih"]) + F.linear(h, w["hh"], w["b_hh"])).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def carried(at: At, read: Callable[[], Tensor], width: int, cell: Mapping[str, Tensor],
            scope: Literal["sequence", "token", "static"]) -> Tensor:  # fmt: skip
    """h at this site: of each unit (decided once, from its prompt), or of each position (scope "token").

    ``read`` gives what the network takes here; without a ``cell`` it is one tanh layer and carries nothing.
    """
    if scope == "token":
        return _at_positions(at, read(), cell)
    here = (at.name, at.part.owner, at.context.share, at.path)
    if at.around is not None:
        return _for_experts(at, here, width)
    found = at.context.again if at.context.recomputing else at.memory
    if (*here, "out") not in found:
        if (*here, "out") not in at.memory:
            at.require_prompt()
        x = read()
        found[*here, "out"] = torch.tanh(x) if not cell else _step(at, at.memory, here, x, cell)
    h: Tensor = found[*here, "out"]
    return h


def _at_positions(at: At, x: Tensor, cell: Mapping[str, Tensor]) -> Tensor:
    if not cell:
        return torch.tanh(x)
    if at.around is not None:  # one expert's tokens are nobody's sequence
        zero = torch.zeros_like(x)
        return lstm(x, (zero, zero), cell)[0]
    # not taken out when read: a block that is recomputed reads it again
    here = (at.name, at.part.owner, at.context.share, at.path)
    calls = at.context.again if at.context.recomputing else at.scratch
    number = calls[here] = calls.get(here, 0) + 1  # a layer may be called for two things
    return _step(at, at.scratch, (*here, number), x, cell)


def _for_experts(at: At, here: tuple[Any, ...], width: int) -> Tensor:
    """The state as it was when the experts of a block were reached first; they do not change it."""
    state: State | None = at.memory.get((*here, "in"))
    if state is None:
        state = at.memory.get((*here[:3], "state"))
    if state is None:
        state = (torch.zeros(at.part.unit_count, width, dtype=at.dtype, device=at.x.device),) * 2
    at.memory[*here, "in"] = state
    return _rows(state[0], at.part.unit_count)


def _step(
    at: At, store: dict[Any, Any], here: tuple[Any, ...], x: Tensor, cell: Mapping[str, Tensor]
) -> Tensor:
    """One step from the state that the site before left; from the same one when a block is recomputed."""
    last = (*here[:3], "state")
    again = at.context.recomputing
    given: State | None = store[*here, "in"] if again else store.get(last)
    if again and given is not None:
        _has_gradients(given, cell)
    state = given
    if state is not None and store is at.memory:
        state = (_rows(state[0], x.shape[0]), _rows(state[1], x.shape[0]))
    if state is None or state[0].shape != x.shape:
        state = (torch.zeros_like(x), torch.zeros_like(x))
    h, c = lstm(x, state, cell)
    if not again:
        store[*here, "in"] = given
        store[last] = (h, c)
    return h


def _has_gradients(state: State, cell: Mapping[str, Tensor]) -> None:
    trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in cell.values())
    if trained and not state[0].requires_grad:
        raise UnsupportedError(
            "the gates' state goes from block to block, and reentrant checkpointing cuts its gradient there; enable "
            "gradient checkpointing with use_reentrant=False."
        )


def _rows(value: Tensor, rows: int) -> Tensor:
    """A value by unit, where each unit may have become several (beams)."""
    return value if value.shape[0] == rows else value.repeat_interleave(rows // value.shape[0], 0)
