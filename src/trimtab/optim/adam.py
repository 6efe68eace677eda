"""AdamW over the fp32 master tensors of one adapter, and its state as named tensors.

The state is plain tensors by name (moments, counts and averages), so that it is stored in safetensors and
a resumed run continues bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.errors import FileFormatError, NonFiniteLossError
from trimtab.optim.average import PREFIX, Average
from trimtab.optim.paged import paged_zeros_like
from trimtab.optim.params import AdamParams, StatePlace

PARTS = ("step", "exp_avg", "exp_avg_sq", "average")
PIECE = 64 * 2**20
"""Bytes of parameters whose moments visit the device together."""


class Adam:
    """The optimiser of one adapter.

    Args:
        named: its trained parameters by key, in a fixed order.
        rates: factors on the learning rate by key, where they are not 1 (`Adapter.rates`).
        place: where the moments lie between steps. host: in host memory (pinned, for a CUDA device), and a step fetches
            those of a few tensors at a time; paged: in memory that CUDA moves itself. The arithmetic is the same.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        rates: Mapping[str, float] | None = None,
        *,
        place: StatePlace = "device",
    ) -> None:
        self.named = dict(named)
        parts = pieces(self.named, PIECE) if place == "host" else [self.named]
        self._inners = [
            torch.optim.AdamW(groups(part, rates or {}), lr=1.0, foreach=True) for part in parts
        ]
        self._place = place
        self.average = Average(self.named)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that exist now."""
        return [p.grad for p in self.named.values() if p.grad is not None]

    @property
    def kept(self) -> list[Tensor]:
        """Moments, counts and averages, as they lie."""
        inner = [value for kept in self._kept().values() for value in kept.values()]
        return [*inner, *self.average.kept]

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def normalise(self, weight: float) -> None:
        """Divide the gradients, which are sums, by the weight of what they are sums of."""
        torch._foreach_div_(self.gradients, weight)

    def step(self, params: AdamParams) -> float:
        """One step on the gradients, which stay; returns their norm before clipping.

        Raises `NonFiniteLossError` for a norm that is not finite; the tensors and the moments are then as
        they were.
        """
        gradients = self.gradients
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            raise NonFiniteLossError("the gradient is not finite; the adapter is as it was.")
        if params.clip is not None and norm > params.clip:
            torch._foreach_mul_(gradients, params.clip / (norm + 1e-6))
        for inner in self._inners:
            for group in inner.param_groups:
                group["lr"] = params.lr * group["rate"]
                group["betas"] = (params.beta1, params.beta2)
                group["eps"] = params.eps
                group["weight_decay"] = params.weight_decay if group["decays"] else 0.0
            if self._place == "paged":
                begin(inner)
            with visiting(inner) if self._place == "host" else nullcontext():
                inner.step()
        if params.ema is not None:
            self.average.update(params.ema)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and counts by ``part::key``, on CPU; a tensor that was never stepped has none."""
        found: dict[str, Tensor] = {}
        kept = self._kept()
        for key, parameter in self.named.items():
            for part, value in kept.get(parameter, {}).items():
                found[f"{part}::{key}"] = value.detach().cpu().contiguous()
        return found | self.average.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave. Raises `FileFormatError` for a name that does not belong."""
        owner = {p: inner for inner in self._inners for p in _parameters(inner)}
        for inner in self._inners:
            inner.state.clear()
        for name, value in state.items():
            part, _, key = name.partition("::")
            if name == PREFIX:
                continue
            parameter = self.named.get(key)
            if part not in PARTS or parameter is None:
                raise FileFormatError(
                    f"the optimiser's state has {name!r}, which is not this adapter's."
                )
            if part != "step" and value.shape != parameter.shape:
                raise FileFormatError(
                    f"the optimiser's {name!r} has shape {tuple(value.shape)}, "
                    f"the tensor {tuple(parameter.shape)}."
                )
            if part == PARTS[-1]:
                continue
            # The count of steps stays on CPU, where AdamW keeps it.
            placed = value.clone() if part == "step" else self._placed(value, parameter)
            owner[parameter].state[parameter][part] = placed
        self.average.restore(state)

    def _placed(self, value: Tensor, parameter: Tensor) -> Tensor:
        """A moment, where those of its parameter lie between steps."""
        if self._place == "paged":
            return paged_zeros_like(parameter).copy_(value)
        here = value.to(parameter.device).clone()
        return _waiting(here) if self._place == "host" else here

    def _kept(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        found = {}
        for inner in self._inners:
            found.update({p: inner.state[p] for p in _parameters(inner) if p in inner.state})
        return found


def _parameters(inner: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in inner.param_groups for p in group["params"]]


def pieces(named: Mapping[str, nn.Parameter], most: int) -> list[dict[str, nn.Parameter]]:
    """Parameters in order, in pieces of at most so many bytes, or of one parameter."""
    found: list[dict[str, nn.Parameter]] = [{}]
    size = 0
    for key, parameter in named.items():
        if found[-1] and size + parameter.nbytes > most:
            found.append({})
            size = 0
        found[-1][key] = parameter
        size += parameter.nbytes
    return found


def begin(inner: torch.optim.Optimizer) -> None:
    """Moments of parameters that are stepped for the first time, as AdamW begins them, in paged memory."""
    for parameter in _parameters(inner):
        if parameter.grad is not None and not inner.state[parameter]:
            moments = {part: paged_zeros_like(parameter) for part in PARTS[1:3]}
            inner.state[parameter] = {"step": torch.tensor(0.0), **moments}


@contextmanager
def visiting(inner: torch.optim.Optimizer) -> Iterator[None]:
    """The moments of an optimiser on the device of their parameters; afterwards in host memory again."""
    for parameter, state in inner.state.items():
        for part in PARTS[1:3]:
            state[part] = state[part].to(parameter.device, non_blocking=True)
    yield
    for state in inner.state.values():
        for part in PARTS[1:3]:
            state[part] = _waiting(state[part])


def _waiting(tensor: Tensor) -> Tensor:
    """A tensor in host memory; one that is there already, itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


def groups(named: Mapping[str, nn.Parameter], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups: by whether weight decay is for them (matrices), and by their factor on the rate."""
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for key, parameter in named.items():
        found.setdefault((parameter.dim() > 1, rates.get(key, 1.0)), []).append(parameter)
    return [
        {"params": members, "decays": decays, "rate": rate}
        for (decays, rate), members in sorted(
            found.items(), key=lambda item: (not item[0][0], item[0][1])
        )
    ]


def parameter_groups(
    adapter: Adapter, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups of an attached adapter for an optimiser of one's own, with its method's rates.

    ``torch.optim.AdamW(tt.parameter_groups(adapter, lr=2e-4))``
    """
    named = {k: p for k, p in adapter.tensors.items() if isinstance(p, nn.Parameter)}
    return [
        {
            "params": group["params"],
            "lr": lr * group["rate"],
            "weight_decay": weight_decay if group["decays"] else 0.0,
        }
        for group in groups(named, adapter.rates)
    ]
