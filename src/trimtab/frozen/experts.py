"""The experts of a mixture-of-experts model, stored as three-dimensional parameters.

transformers 5 keeps all experts of a block in one module with ``gate_up_proj`` (E, 2I, H) and
``down_proj`` (E, H, I), or their transposes, and runs them through its experts interface. `run` is that
computation with a hook around each expert's linear map, so that any layer-wise edit can act there;
`ExpertLayer` shows one expert's slice as an ordinary linear layer.

Shapes: N tokens, K chosen experts per token, E experts, H width, I inner width.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import TargetError
from trimtab.frozen.linear import LinearMap

_NAMES = ("gate_up_proj", "up_proj", "down_proj")


class Experts(Protocol):
    """The attributes that transformers' experts interface gives to such a module."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


class StoredExperts(nn.Module):
    """An experts module that keeps its parameters in another form than dense tensors. Abstract."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters that the dense module has, biases too, in its order and orientation."""

    @abstractmethod
    def layer(self, name: str, expert: int) -> ExpertLayer:
        """Expert ``expert`` of the parameter ``name``."""

    @abstractmethod
    def with_dense(self, new: Mapping[str, Tensor]) -> nn.Module:
        """This module with other parameters, dense ones in its own orientation, in the place of these; the rest is
        shared."""


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the 3-D expert parameters of a module that follows the experts interface; else none."""
    return [name for name, shape in _shapes(module).items() if name in _NAMES and len(shape) == 3]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    if isinstance(module, StoredExperts):
        return module.shapes
    if "has_gate" not in module.__dict__ or "is_transposed" not in module.__dict__:
        return {}
    return {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}


def followed(module: nn.Module) -> bool:
    """Whether `run` computes what the module does."""
    return not (vars(module).get("has_post_expert_norm") or vars(module).get("_is_expert_parallel"))


def expert_count(module: nn.Module, name: str) -> int:
    """How many experts the parameter ``name`` holds."""
    return _shapes(module)[name][0]


def replaced(module: nn.Module, new: Mapping[str, Tensor]) -> nn.Module:
    """An experts module like this one with other dense parameters in the place of these; the rest is shared."""
    if isinstance(module, StoredExperts):
        return module.with_dense(new)
    other = copy.copy(module)
    frozen = {name: nn.Parameter(value, requires_grad=False) for name, value in new.items()}
    other._parameters = {**module._parameters, **frozen}
    return other


class ExpertLayer(LinearMap):
    """One expert's slice of a 3-D parameter. Abstract: how it is stored is what differs."""

    kind = "linear"
    in_peft = False  # PEFT numbers such tensors by the nesting of its wrappers
    width: int
    """Width of what the experts are given."""

    @classmethod
    def view(cls, module: nn.Module) -> ExpertLayer | None:
        return None

    @staticmethod
    def of(module: nn.Module, name: str, expert: int) -> ExpertLayer:
        """Expert ``expert`` of the parameter ``name``."""
        if isinstance(module, StoredExperts):
            return module.layer(name, expert)
        return DenseExpert.of_parameter(module, name, expert)


class DenseExpert(ExpertLayer):
    """A slice of a dense parameter."""

    def __init__(
        self, module: nn.Module, weight_OI: Tensor, bias_O: Tensor | None, *, first: bool
    ) -> None:
        self.module = module
        self._weight = weight_OI
        self._bias = bias_O
        self.out_features, self.in_features = weight_OI.shape
        self.width = self.in_features if first else self.out_features

    @classmethod
    def of_parameter(cls, module: nn.Module, name: str, expert: int) -> DenseExpert:
        """Expert ``expert`` of the parameter ``name``."""
        weight = cast(Tensor, module._parameters[name])[expert]
        bias = module._parameters.get(f"{name}_bias")
        transposed = cast(Experts, module).is_transposed
        return cls(
            module,
            weight.T if transposed else weight,
            None if bias is None else bias[expert],
            first=name != "down_proj",
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    def dense(self) -> Tensor:
        return self._weight

    def bias(self) -> Tensor | None:
        return self._bias

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})

    def call(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


Around = Callable[[str, int, ExpertLayer, Tensor, Tensor], Tensor]
"""``around(parameter, expert, layer, x, tokens)`` is the (edited) output of one expert's linear map."""


def run(
    module: nn.Module, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor, around: Around
) -> Tensor:
    """The forward of an experts module, with ``around`` in place of each expert's linear maps."""
    if not followed(module):
        raise TargetError(
            f"{type(module).__name__} normalises or distributes its experts' outputs, which adapters on expert "
            "parameters do not follow yet; exclude them from the targets ('exclude': '**.experts.*')."
        )
    experts = cast(Experts, module)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    activation = cast(Any, module).act_fn if not experts.has_gate else None
    out_NH = torch.zeros_like(hidden_NH)
    for expert in index_NK.unique().tolist():
        if expert >= experts.num_experts:
            continue
        tokens, chosen = (index_NK == expert).nonzero(as_tuple=True)
        x = hidden_NH[tokens]
        inner = around(first, expert, ExpertLayer.of(module, first, expert), x, tokens)
        inner = experts._apply_gate(inner) if activation is None else activation(inner)
        y = around("down_proj", expert, ExpertLayer.of(module, "down_proj", expert), inner, tokens)
        y = y * weights_NK[tokens, chosen, None].to(y.dtype)
        out_NH = out_NH.index_add(0, tokens, y.to(out_NH.dtype))
    return out_NH
