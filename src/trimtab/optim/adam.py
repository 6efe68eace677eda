"""AdamW over the fp32 master tensors of one adapter, and its state as named tensors.

The state is plain tensors by name (moments, counts and averages), so that it is stored in safetensors and
a resumed run continues bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.errors import FileFormatError, NonFiniteLossError
from trimtab.optim.average import PREFIX, Average
from trimtab.optim.params import AdamParams

PARTS = ("step", "exp_avg", "exp_avg_sq", "average")


class Adam:
    """The optimiser of one adapter.

    Args:
        named: its trained parameters by key, in a fixed order.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)
        groups = [{"params": members} for members in _by_rank(self.named)]
        self._inner = torch.optim.AdamW(groups, lr=1.0, foreach=True)
        self.average = Average(self.named)

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients that exist now."""
        return [p.grad for p in self.named.values() if p.grad is not None]

    def clear(self) -> None:
        """Forget all gradients."""
        self._inner.zero_grad(set_to_none=True)

    def step(self, params: AdamParams, weight: float) -> float:
        """One step on the gradients divided by ``weight``; returns their norm before clipping.

        Gradients are cleared. Raises `NonFiniteLossError` for a norm that is not finite; the tensors
        and the moments are then as they were.
        """
        gradients = self.gradients
        torch._foreach_div_(gradients, weight)
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        if not math.isfinite(norm):
            self.clear()
            raise NonFiniteLossError("the gradient is not finite; the adapter is as it was.")
        if params.clip is not None and norm > params.clip:
            torch._foreach_mul_(gradients, params.clip / (norm + 1e-6))
        for number, group in enumerate(self._inner.param_groups):
            group["lr"] = params.lr
            group["betas"] = (params.beta1, params.beta2)
            group["eps"] = params.eps
            group["weight_decay"] = params.weight_decay if number == 0 else 0.0
        self._inner.step()
        self.clear()
        if params.ema is not None:
            self.average.update(params.ema)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and counts by ``part::key``, on CPU; a tensor that was never stepped has none."""
        found: dict[str, Tensor] = {}
        for key, parameter in self.named.items():
            for part, value in self._inner.state.get(parameter, {}).items():
                found[f"{part}::{key}"] = value.detach().cpu().contiguous()
        return found | self.average.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave. Raises `FileFormatError` for a name that does not belong."""
        self._inner.state.clear()
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
            placed = value.clone() if part == "step" else value.to(parameter.device).clone()
            self._inner.state[parameter][part] = placed
        self.average.restore(state)


def _by_rank(named: Mapping[str, nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices, vectors): weight decay is for the first."""
    matrices = [p for p in named.values() if p.dim() > 1]
    return matrices, [p for p in named.values() if p.dim() <= 1]
