"""A budget of ranks (AdaLoRA): which components of A, E, B (E has one number for each) stay, over all sites.

    I = |p · ∂loss/∂p|,   Ī ← β₁ Ī + (1 − β₁) I,   U ← β₂ U + (1 − β₂) |I − Ī|,   s = Ī · U
    score of component k = s(E_k) + mean of s over row k of A + mean of s over column k of B
    b(t) = b₀ up to tinit,  b_T + (b₀ − b_T) (1 − (t − tinit) / (T − tinit − tfinal))³,  b_T from T − tfinal on

Shapes: A_..RI, B_..OR, E_..R1; the dots are the experts of a mixture, and kernels follow I and R. In a grouped
convolution B has R/G columns, which belong to other components in each group of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapt.contract import Params, Progress
from trimtab.errors import ConfigError, TrainingError

PARTS = ("A", "E", "B")
Factored = Mapping[str, Params]
"""A, E and B by path."""


@dataclass(frozen=True)
class Budget:
    """The schedule; ``target`` is b_T per site (and expert), ``every`` the steps between two cuts."""

    target: int
    tinit: int
    tfinal: int
    every: int
    beta1: float
    beta2: float

    def left(self, step: int, total: int, first: int, last: int) -> int:
        """b(t): how many of ``first`` components may be left, where ``last`` are in the end."""
        if step <= self.tinit:
            return first
        share = max(0.0, 1 - (step - self.tinit) / (total - self.tfinal - self.tinit))
        return int((first - last) * share**3 + last)

    def after_step(self, sites: Factored, memory: dict[str, Tensor], progress: Progress) -> None:
        """Weigh the components by this step's gradients, and cut what the budget no longer allows.

        Raises:
            TrainingError: the number of steps is not known, or the gradients are gone.
            ConfigError: the schedule leaves no step for cutting.
        """
        step = progress.step
        if step <= self.tinit:
            self._observe(sites, memory)
            return
        end = self._end(progress)
        if step > end:
            _mask(sites, {path: memory[key] for path in sites if (key := f"{path}.kept") in memory})
            return
        if step < end:
            self._observe(sites, memory)
        if step == end or step % self.every == 0:
            first = sum(p["E"].numel() for p in sites.values())
            last = self.target * sum(p["E"].shape[:-2].numel() for p in sites.values())
            budget = self.left(step, end + self.tfinal, first, last)
            kept = _cut(sites, memory, first - budget) if budget < first else {}
            if step == end:
                memory.clear()
                memory.update({f"{path}.kept": mask for path, mask in kept.items()})

    def _end(self, progress: Progress) -> int:
        if progress.total is None:
            raise TrainingError(
                f"ranks are shared out from step {self.tinit + 1} on, and how many steps there will be is not known: "
                "give total (AdamParams(total=...) or Stepper(adapter, total=...))."
            )
        end = progress.total - self.tfinal
        if self.tinit >= end:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of {progress.total} steps to share out "
                "ranks; lower them, or train longer."
            )
        return end

    def _observe(self, sites: Factored, memory: dict[str, Tensor]) -> None:
        """Take this step's gradients into the averages; a tensor that has none weighs nothing in it."""
        if all(params[part].grad is None for params in sites.values() for part in PARTS):
            raise TrainingError(
                "ranks are weighed by gradients, and there are none: call Stepper.after() before they are cleared."
            )
        for path, params in sites.items():
            for part in PARTS:
                p, key = params[part], f"{path}.{part}"
                none = torch.zeros_like(p)
                now = none if p.grad is None else (p * p.grad).abs()
                mean = self.beta1 * memory.get(f"{key}.mean", none) + (1 - self.beta1) * now
                spread = self.beta2 * memory.get(f"{key}.spread", none)
                memory[f"{key}.mean"] = mean
                memory[f"{key}.spread"] = spread + (1 - self.beta2) * (now - mean).abs()


def surviving(params: Params) -> Tensor:
    """Numbers of the components whose E is not zero: at least one, and all of a grouped convolution's."""
    e, b = params["E"], params["B"]
    alive = (e != 0).reshape(e.shape[:-2].numel(), e.shape[-2]).any(0)
    if b.shape[e.dim() - 1] != len(alive):
        alive = torch.ones_like(alive)
    return alive.nonzero().flatten() if alive.any() else torch.zeros(1, dtype=torch.long)


def trimmed(a: Tensor, b: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """A and B with the surviving components alone."""
    index, axis = surviving(params), params["E"].dim() - 2
    if len(index) == a.shape[axis]:
        return a, b
    if not a.shape[axis]:  # a file that PEFT trimmed to nothing here
        return a.new_zeros(1, *a.shape[1:]), b.new_zeros(len(b), 1, *b.shape[2:])
    return a.index_select(axis, index), b.index_select(axis + 1, index)


def _cut(sites: Factored, memory: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Set the E of the ``count`` least important components (and of their equals) to zero; which stay, by path."""
    scores = {path: _scores(path, params, memory) for path, params in sites.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.kthvalue(count).values
    kept = {path: score > threshold for path, score in scores.items()}
    _mask(sites, kept)
    return kept


def _mask(sites: Factored, kept: Mapping[str, Tensor]) -> None:
    for path, mask in kept.items():
        sites[path]["E"].masked_fill_(~mask.unsqueeze(-1), 0.0)


def _scores(path: str, params: Params, memory: Mapping[str, Tensor]) -> Tensor:
    """(..., R)"""
    a, e, b = (memory[f"{path}.{part}.mean"] * memory[f"{path}.{part}.spread"] for part in PARTS)
    experts = params["E"].dim() - 2
    a, b = a.flatten(experts + 1), b.flatten(experts + 1)
    groups = e.shape[-2] // b.shape[-1]
    b = b.unflatten(-2, (groups, -1)).mean(-2).flatten(-2)
    return e.squeeze(-1) + (a.mean(-1) + b)
