"""What is learnt by a step, what its optimiser is told, and what training keeps where. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trimtab.config import Config
from trimtab.errors import ConfigError


class AdamParams(Config):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for one step.

    ``clip`` bounds the global norm of the adapter's gradient (None: no bound). ``weight_decay`` holds
    for matrices only: vectors (biases, scales, gates) are never pulled to zero. ``ema`` keeps an
    exponential moving average of the tensors with that decay beside them (None: none). ``total`` is the number
    of steps of the whole run, for methods with a schedule of their own (AdaLoRA's budget). Gradients are sums;
    ``divide`` says whether a step divides them by what their data count (the weight of their tokens), so that
    ``clip`` and ``eps`` mean the same whatever the size of a batch, or takes them as they are, as Tinker does.
    """

    lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    total: int | None = Field(default=None, ge=1)
    divide: bool = True


class CrossEntropy(Config):
    """−log p of each target, and what keeps a model from growing too sure of itself. Losses that are reported are
    −log p alone."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This share of every target is spread evenly over the vocabulary (arXiv 1512.00567), such as 0.1."""
    z_loss: float = Field(default=0.0, ge=0)
    """Times the square of log Σ exp(logits), which stays near zero then (arXiv 2204.02311), such as 1e-4."""


Place = Literal["device", "host"]
StatePlace = Literal[Place, "paged"]


class Memory(Config):
    """Less memory for more time. Nothing that is computed changes."""

    recompute: Literal["none", "mlp", "blocks"] = "none"
    """What is not kept for the backward but computed again: of each block what lies inside its MLP (gate, up and their
    product), or all but its input."""
    activations: Place = "device"
    """host: what is kept for the backward waits in host memory (for a CUDA device)."""
    optimiser: StatePlace = "device"
    """host: the optimiser's moments wait in host memory and visit the device a piece at a time; paged: CUDA moves their
    pages to the host while the device is full (both for a CUDA device)."""

    def check(self, device: str) -> None:
        """Raise `ConfigError` for memory that is to wait where the model lies already."""
        named = {"activations": self.activations, "optimiser": self.optimiser}
        away = {name: place for name, place in named.items() if place != "device"}
        for name, place in away.items() if device == "cpu" else ():
            raise ConfigError(
                f"memory.{name}: {place} moves it off a CUDA device, and this model is in host memory already; leave "
                "it out, or recompute instead."
            )
