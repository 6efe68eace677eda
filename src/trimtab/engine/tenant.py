"""What the engine keeps for one adapter between calls: its optimiser, and what its gradients are sums of."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import torch
from torch import nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.stepper import Stepper
from trimtab.engine.results import StepResult
from trimtab.errors import NonFiniteLossError, TrainingError
from trimtab.optim.adam import Adam
from trimtab.optim.params import AdamParams, StatePlace

SHOWN = 8


class Tenant:
    """An attached adapter; ``weight`` and ``origins`` say what its gradients are sums of. ``place`` is
    where its moments lie between steps."""

    def __init__(self, adapter: Adapter, place: StatePlace = "device") -> None:
        self.adapter = adapter
        named = {
            k: p
            for k, p in adapter.tensors.items()
            if isinstance(p, nn.Parameter) and p.requires_grad
        }
        if not named:
            raise TrainingError(
                f"adapter {adapter.name!r} has no tensor that requires a gradient; "
                "attach it with trainable=True."
            )
        self.adam = Adam(named, adapter.rates, place=place)
        self.stepper = Stepper(adapter)
        self.generator = torch.Generator().manual_seed(_seed(adapter.name))
        """What its random numbers begin from (dropout, gates), one for each forward that it takes part in."""
        self.weight = 0.0
        self.origins: list[str] = []

    @property
    def steps(self) -> int:
        """Optimiser steps done."""
        return self.stepper.step

    def add(self, weight: float, origins: Iterable[str]) -> None:
        """Note that the gradients now hold these examples too."""
        self.weight += weight
        self.origins += [origin for origin in origins if origin]

    def discard(self) -> None:
        """Drop the gradients of the step in progress."""
        self.adam.clear()
        self.weight = 0.0
        self.origins = []

    def step(self, params: AdamParams) -> StepResult:
        """One optimiser step on the gradients since the last one, divided by what their data count.

        Raises:
            TrainingError: no example that counts has been seen since the last step.
            NonFiniteLossError: the gradient is not finite; names the examples, changes no tensor.
        """
        name, weight = self.adapter.name, self.weight
        if not self.adam.gradients or weight <= 0:
            raise TrainingError(
                f"adapter {name!r} has no gradients; call forward_backward before optim_step."
            )
        try:
            if params.divide:
                self.adam.normalise(weight)
            self.stepper.total = params.total
            self.stepper.before()
            norm = self.adam.step(params)
            self.stepper.after()
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"adapter {name!r}: {error} Examples: {listed(self.origins)}"
            ) from None
        finally:
            self.discard()
        return StepResult(self.steps, norm, weight)


def _seed(name: str) -> int:
    """Of an adapter's generator: from what the process was seeded with, and its name alone, so that it does not matter
    which others there are, and in which order they came."""
    digest = blake2b(f"{torch.initial_seed()} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def listed(origins: Iterable[str]) -> str:
    """The first few origins, and how many more."""
    found = list(origins)
    text = ", ".join(found[:SHOWN]) or "without origin"
    return text + (f" and {len(found) - SHOWN} more." if len(found) > SHOWN else ".")
