"""Forwards with gradients that keep little for backward: frozen norms, MLPs, attention, dropout and heads of ours.

For the length of such a forward (the bank opens `lean` around it), modules whose code is known
(`trimtab.models.forms`) are instances of a subclass with a forward of ours, which calls their layers as before, so that
sites, routes and hooks see what they would see; attention is ours where torch's would do it; and a model that takes the
loss itself computes no logits that nobody looks at. Before and after, the model is as it was. On other devices than a
CPU and CUDA, without gradients, with a trained norm, and under a compiler, forward is the family's; so it is on CUDA of
an MLP whose activation is several operations to torch, which autocast there takes in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt.attention import Ours
from trimtab.adapt.tree import walk
from trimtab.kernels import products
from trimtab.kernels.activations import kind_of
from trimtab.kernels.dropout import dropout
from trimtab.kernels.frozen_blocks import PLAIN, activated, gated_product, rms_norm
from trimtab.kernels.remade import remade, remaking
from trimtab.kernels.tracing import traced
from trimtab.losses import promised_logits
from trimtab.models.forms import Gated, Norm, Plain, form_of

DEVICES = ("cpu", "cuda", "meta")
NARROW = (torch.bfloat16, torch.float16, torch.float32)
"""Of what norms take: they compute in fp32."""
ELEMENTWISE = frozenset(
    {
        "FastGELUActivation", "GELU", "GELUActivation", "GELUTanh", "NewGELUActivation", "PytorchGELUTanh",
        "QuickGELUActivation", "ReLU", "ReLUSquaredActivation", "SiLU", "SiLUActivation",
    }
)  # fmt: skip
"""Activations that see each element by itself and have no parameters."""


class Lean:
    """What changes in a model for the length of a forward; entered again for what is recomputed of it.

    Args:
        loss: whether the model is to take a loss of its logits.
    """

    def __init__(self, model: nn.Module, *, loss: bool = False) -> None:
        found: list[tuple[nn.Module, Any]] = [(module, type(module)) for module in walk(model)]
        self._parts: list[tuple[nn.Module, Any, Any]] = [
            (module, kind, _lean(kind)) for module, kind in found if form_of(kind) is not None
        ]
        self._parts += [(m, kind, _LEAN[kind]) for m, kind in found if kind in _LEAN]
        if products.fp32_is_faster():
            self._parts += [(m, kind, _Widened) for m, kind in found if kind is nn.Linear]
        head = _plain_head(model) if loss else None
        if head is not None:
            self._parts.append((head, nn.Linear, _Promising))
        self._attention = Ours(model)
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._attention.__enter__()
            for module, _, leaner in self._parts:
                _become(module, leaner)

    def __exit__(self, *raised: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for module, kind, _ in self._parts:
                _become(module, kind)
            self._attention.__exit__()


def _become(module: nn.Module, kind: Any) -> None:
    """Change the class of a module, without what else `nn.Module` looks at where an attribute is set."""
    object.__setattr__(module, "__class__", kind)


@contextmanager
def lean(model: nn.Module, *, loss: bool = False) -> Iterator[Lean]:
    """A forward inside keeps less for backward, unless somebody else already says what it keeps."""
    made = Lean(model, loss=loss)
    free = torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    with made, remaking() if free else nullcontext():
        yield made


_families: ContextVar[bool] = ContextVar("_families", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, models run by the code of their families, and keep what that keeps."""
    before = _families.set(True)
    try:
        yield
    finally:
        _families.reset(before)


def leans(model: nn.Module) -> bool:
    """Whether a forward that begins now has gradients (or will, when a checkpoint repeats it), and nobody traces or
    transforms it."""
    return (
        (torch.is_grad_enabled() or model.training)
        and not traced()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and not _families.get()
        and next((p.device.type for p in model.parameters()), "") in DEVICES
    )


def _plain_head(model: nn.Module) -> nn.Module | None:
    """The output head of a model, where it is a frozen linear layer that nobody watches."""
    if not isinstance(model, PreTrainedModel):
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    return head if _plain(head) else None


def _plain(layer: nn.Module) -> bool:
    """Whether its tensors are frozen, and are what they look like: no shards, and no values in another form."""
    held = [tensor for tensor in layer._parameters.values() if tensor is not None]
    return all(type(t) in PLAIN and not t.requires_grad for t in held)


class _Widened(nn.Linear):
    """A frozen layer whose products are taken in fp32, where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not products.many(
            x
        ):  # the first question, since a model that decodes asks at each layer of each token
            return super().forward(x)
        if products.autocast_dtype(x) == self.weight.dtype:
            x = x.to(self.weight.dtype)
        if not (_plain(self) and x.dtype == self.weight.dtype and products.widens(x)):
            return super().forward(x)
        return products.frozen_linear(x, self.weight, self.bias)

    __module__, __qualname__ = nn.Linear.__module__, nn.Linear.__qualname__


class _Dropping(nn.Dropout):
    """Dropout that keeps a seed."""

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and not self.inplace
        return dropout(x, self.p) if drops else super().forward(x)

    __module__, __qualname__ = nn.Dropout.__module__, nn.Dropout.__qualname__


class _Centring(nn.LayerNorm):
    """A frozen norm of torch, whose output is made again."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        fits = _fits(x) and _plain(self) and products.autocast_dtype(x) is None
        if not fits or y.dtype != x.dtype:
            return y
        return remade(y, F.layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps)

    __module__, __qualname__ = nn.LayerNorm.__module__, nn.LayerNorm.__qualname__


_LEAN: dict[Any, type[nn.Module]] = {nn.Dropout: _Dropping, nn.LayerNorm: _Centring}


class _Promising(nn.Linear):
    """A head whose logits wait for somebody to look at them."""

    def forward(self, x: Tensor) -> Tensor:
        fits = _fits(x) and x.requires_grad
        fits = fits and (x.dtype == self.weight.dtype or products.autocast_dtype(x) is not None)
        return promised_logits(x, self.weight, self.bias) if fits else super().forward(x)

    __module__, __qualname__ = nn.Linear.__module__, nn.Linear.__qualname__


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
        if fits and isinstance(form, Gated) and _elementwise(self, form.activation, x):
            return _gated(self, form, x)
        if fits and isinstance(form, Plain) and _elementwise(self, form.activation, x):
            inner = activated(self.get_submodule(form.up)(x), self.get_submodule(form.activation))
            return self.get_submodule(form.down)(inner) if form.down else inner
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
        type(x) in PLAIN
        and x.device.type in DEVICES
        and x.is_floating_point()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _frozen(module: nn.Module, x: Tensor) -> bool:
    weight = module._parameters.get("weight")  # it may be held elsewhere, by who shards it
    if weight is None or type(weight) not in PLAIN or weight.requires_grad:
        return False
    return weight.dtype == x.dtype and x.dtype in NARROW


def _elementwise(module: nn.Module, activation: str, x: Tensor) -> bool:
    part = module.get_submodule(activation)
    if part._forward_hooks or part._forward_pre_hooks:
        return False
    return kind_of(part) is not None if x.is_cuda else type(part).__name__ in ELEMENTWISE
