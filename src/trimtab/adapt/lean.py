"""Frozen norms and MLPs that keep little for backward, in place of the families' own, while an engine trains.

Inside `lean`, modules whose code is known (`trimtab.models.forms`) are instances of a subclass with a forward of ours,
which calls their layers as before, so that sites, routes and hooks see what they would see. Outside, the model is as
it was. On other devices than a CPU, without gradients, with a trained norm, and under a compiler, forward is the
family's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from trimtab.kernels.frozen_blocks import activated, gated_product, rms_norm
from trimtab.models.forms import Gated, Norm, Plain, form_of

NARROW = (torch.bfloat16, torch.float16, torch.float32)
"""Of what norms take: they compute in fp32."""
ELEMENTWISE = frozenset(
    {
        "FastGELUActivation", "GELU", "GELUActivation", "GELUTanh", "NewGELUActivation", "PytorchGELUTanh",
        "QuickGELUActivation", "ReLU", "ReLUSquaredActivation", "SiLU", "SiLUActivation",
    }
)  # fmt: skip
"""Activations that see each element by itself and have no parameters."""


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Inside, known frozen parts of a model keep less for backward."""
    before: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module in model.modules():
            kind: Any = type(module)
            if form_of(kind) is not None:
                before.append((module, kind))
                module.__class__ = _lean(kind)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


@cache
def _lean(kind: Any) -> type[nn.Module]:
    """A subclass that looks like ``kind`` and has a forward of ours."""
    form = form_of(kind)

    def forward(self: nn.Module, *given: Tensor, **named: Tensor) -> Any:
        (x,) = (*given, *named.values())  # families call it by names of their own
        fits = _fits(x)
        if fits and isinstance(form, Norm) and _frozen(self, x):
            rounding = cast(Literal["before", "after", "offset"], form.rounding)
            return rms_norm(x, self._parameters["weight"], self.__dict__[form.epsilon], rounding)  # type: ignore[arg-type]
        if fits and isinstance(form, Gated) and _elementwise(self, form.activation):
            return _gated(self, form, x)
        if fits and isinstance(form, Plain) and _elementwise(self, form.activation):
            inner = activated(self.get_submodule(form.up)(x), self.get_submodule(form.activation))
            return self.get_submodule(form.down)(inner)
        return kind.forward(self, *given, **named)

    body = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return cast(type[nn.Module], type(kind.__name__, (kind,), body))


def _gated(module: nn.Module, form: Gated, x: Tensor) -> Any:
    if form.gate:  # called first, as the family does: a site may draw random numbers
        gate, up = module.get_submodule(form.gate)(x), module.get_submodule(form.up)(x)
    else:
        gate, up = module.get_submodule(form.up)(x).chunk(2, dim=-1)
    activation = module.get_submodule(form.activation)
    if gate.dtype != up.dtype or gate.shape != up.shape:
        inner = activation(gate) * up
    else:
        inner = gated_product(gate, up, activation)
    return module.get_submodule(form.down)(inner)


def _fits(x: Tensor) -> bool:
    return (
        x.device.type in ("cpu", "meta")
        and x.is_floating_point()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _frozen(module: nn.Module, x: Tensor) -> bool:
    weight = module._parameters["weight"]
    frozen = weight is not None and not weight.requires_grad and weight.dtype == x.dtype
    return frozen and x.dtype in NARROW


def _elementwise(module: nn.Module, activation: str) -> bool:
    part = module.get_submodule(activation)
    hooked = part._forward_hooks or part._forward_pre_hooks
    return type(part).__name__ in ELEMENTWISE and not hooked
