"""Experts whose 3-D parameters are stored in few bits: most of the weights of a mixture lie there.

Each expert's slice W_OI is rounded by itself, as a linear layer of that format would be; the codes and scales of all E
experts are stacked. A forward makes the weight of one chosen expert dense at a time, and backward makes it anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from trimtab.frozen.experts import DenseExpert, ExpertLayer, Experts, StoredExperts, run
from trimtab.frozen.lowbit import LowBit, LowBitLinear, untrained

Round = Callable[[Tensor, Tensor | None], LowBitLinear]
"""Makes a linear layer in few bits of a dense weight and a bias."""


class LowBitExperts(StoredExperts, LowBit):
    """In the place of an experts module of transformers, with the same parameters, of which those that were given to
    `pack` are stored in few bits."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        experts = cast(Experts, module)
        shell = copy.copy(module)  # what it does between the linear maps is its own
        shell._parameters = {}
        self._shell = (shell,)  # in a tuple, so that torch does not take it for a child
        self._templates: dict[str, LowBitLinear] = {}
        self._shapes = {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}
        for name in self._shapes:
            self.register_parameter(name, module._parameters[name])
        self.num_experts, self.has_gate = experts.num_experts, experts.has_gate
        self.has_bias, self.is_transposed = experts.has_bias, experts.is_transposed
        self.is_concatenated = experts.is_concatenated
        self.act_fn = module.__dict__.get("act_fn") or module._modules.get("act_fn")
        self.compute_dtype = next(module.parameters()).dtype
        self.train(module.training)

    @torch.no_grad()
    def pack(self, name: str, value: Tensor, round_one: Round) -> None:
        """Store one parameter in few bits; ``value`` is as the dense module has it."""
        stacks: dict[str, Tensor] = {}
        for expert in range(value.shape[0]):
            one = round_one(value[expert].T if self.is_transposed else value[expert], None)
            for part, tensor in one._buffers.items():
                if tensor is None:
                    continue
                if not expert:
                    stacks[part] = tensor.new_empty((value.shape[0], *tensor.shape))
                stacks[part][expert] = tensor
        self.hold(name, one, stacks)

    def hold(self, name: str, one: LowBitLinear, stacks: Mapping[str, Tensor]) -> None:
        """Take the stacked buffers of such layers as ``one``, which is left empty, for a parameter."""
        self._parameters.pop(name)
        for part, stack in stacks.items():
            self.register_buffer(f"{name}_{part}", stack)
        self.kind, self.compute_dtype = one.kind, one.compute_dtype
        one._buffers = dict.fromkeys(one._buffers)
        self._templates[name] = one

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @property
    def formats(self) -> dict[str, str]:
        """The parameters that are stored in few bits, and in which format."""
        return {name: one.kind for name, one in self._templates.items()}

    def bits_of(self, name: str) -> float:
        """Stored bits per weight of one parameter, scales included."""
        stored = sum(8 * stack.nbytes for stack in self.stacks(name).values())
        return stored / math.prod(self._shapes[name])

    def stacks(self, name: str) -> dict[str, Tensor]:
        """The stored buffers of a parameter, each with the experts as its first dimension."""
        found = {
            part: self._buffers.get(f"{name}_{part}") for part in self._templates[name]._buffers
        }
        return {part: stack for part, stack in found.items() if stack is not None}

    def template(self, name: str) -> LowBitLinear:
        """A layer in the format of a parameter, and of the size of one expert, that holds nothing."""
        return self._templates[name]

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one expert's slice of a parameter."""
        _, first, second = self._shapes[name]
        return (second, first) if self.is_transposed else (first, second)

    def round_like(self, name: str) -> Round:
        """What rounds a weight into just the format of a parameter."""
        return self._templates[name].like

    def dense_parameter(self, name: str) -> Tensor:
        """A parameter as the dense module has it."""
        count = self._shapes[name][0]
        slices = [self.layer(name, expert).dense() for expert in range(count)]
        return torch.stack([one.T if self.is_transposed else one for one in slices])

    @property
    def weights(self) -> int:
        return sum(math.prod(self._shapes[name]) for name in self._templates)

    def layer(self, name: str, expert: int) -> ExpertLayer:
        if name not in self._templates:
            return DenseExpert.of_parameter(self, name, expert)
        bias = self._parameters.get(f"{name}_bias")
        first = name != "down_proj"
        return LowBitExpert(
            self, self._one(name, expert), None if bias is None else bias[expert], first=first
        )

    def _one(self, name: str, expert: int) -> LowBitLinear:
        one = copy.copy(self._templates[name])
        own = {part: stack[expert] for part, stack in self.stacks(name).items()}
        one._buffers = dict.fromkeys(one._buffers) | own
        one.compute_dtype = self.compute_dtype
        return one

    def with_dense(self, new: Mapping[str, Tensor]) -> nn.Module:
        """Where nothing is left in few bits, the module that it was at first."""
        frozen = {name: nn.Parameter(value, requires_grad=False) for name, value in new.items()}
        held = {
            name: frozen.get(name, self._parameters.get(name)) for name in [*self._shapes, *new]
        }
        if not self._templates.keys() - new.keys():
            (shell,) = self._shell
            whole = copy.copy(shell)
            whole._parameters = held
            return whole.train(self.training)
        other = copy.copy(self)
        other._templates = {n: one for n, one in self._templates.items() if n not in new}
        gone = tuple(f"{name}_" for name in new)
        other._buffers = {n: b for n, b in self._buffers.items() if not n.startswith(gone)}
        other._parameters = {n: p for n, p in held.items() if n not in other._templates}
        other._shapes = {n: tuple(new[n].shape) if n in new else self._shapes[n] for n in held}
        return other

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        (shell,) = self._shell
        return cast(Experts, shell)._apply_gate(gate_up_out)

    def forward(self, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return run(
            self,
            hidden_NH,
            index_NK,
            weights_NK,
            lambda name, expert, layer, x, tokens: layer.call(x),
        )

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {', '.join(self._templates)} in {self.bits:.2f} bits"


class LowBitExpert(ExpertLayer):
    """A slice of a parameter in few bits."""

    def __init__(
        self, module: LowBitExperts, linear: LowBitLinear, bias_O: Tensor | None, *, first: bool
    ) -> None:
        self.module = module
        self._linear = linear
        self._bias = bias_O
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.width = self.in_features if first else self.out_features

    @property
    def dtype(self) -> torch.dtype:
        return self._linear.compute_dtype

    @property
    def device(self) -> torch.device:
        return next(self._linear.buffers()).device

    def dense(self) -> Tensor:
        return self._linear.dense(self.dtype)

    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.to(self.dtype)

    def holding(self) -> Iterable[Tensor]:
        return self._linear.buffers()

    def stored(self) -> dict[str, Tensor]:
        raise untrained(self.module)

    def call(self, x: Tensor) -> Tensor:
        y: Tensor = self._linear(x)
        return y if self._bias is None else y + self._bias.to(y.dtype)
