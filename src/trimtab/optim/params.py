"""What one optimiser step of one adapter is told. No torch here."""

from __future__ import annotations

from pydantic import Field

from trimtab.config import Config


class AdamParams(Config):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) for one step.

    ``clip`` bounds the global norm of the adapter's gradient (None: no bound). ``weight_decay`` holds
    for matrices only: vectors (biases, scales, gates) are never pulled to zero. ``ema`` keeps an
    exponential moving average of the tensors with that decay beside them (None: none). ``total`` is the number
    of steps of the whole run, for methods with a schedule of their own (AdaLoRA's budget).
    """

    lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    total: int | None = Field(default=None, ge=1)
