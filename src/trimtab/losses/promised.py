"""Logits that are computed when somebody looks at them, for a model that takes the loss itself.

A model of transformers that is given labels computes all its logits, takes the loss of them and hands both back; in
training nobody looks at the logits. `promised_logits` is a tensor of their shape that holds the hidden states before a
frozen head instead. Its cross-entropy, as transformers takes it (after ``float``, ``view`` and a shift by one), goes
through `linear_cross_entropy`, at the positions that have a label. Anything else makes the logits first: what is then
done with them, in place too, is done with the real ones, and gradients go where they would go.

Legend: V vocabulary, C width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels.products import autocast_dtype, no_autocast
from trimtab.losses.cross_entropy import Form, linear_cross_entropy

Change = Callable[[Tensor], Tensor]


def promised_logits(hidden: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias``, of a frozen head; in the dtype of autocast, where that is on."""
    hidden = hidden.to(autocast_dtype(hidden) or hidden.dtype)
    origin = _Origin(hidden, weight_VC.detach(), None if bias_V is None else bias_V.detach())
    return origin.promise(hidden, hidden.dtype, lambda logits: logits)


class PromisedLogits(Tensor):
    """Has the shape, the dtype and the gradient of logits, and no values before they are asked for."""

    _origin: _Origin
    _hidden: Tensor
    """Those that these logits are of."""
    _change: Change
    """What makes these of the logits that were promised first."""
    _made: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _WATCHES and isinstance(args[0], cls):
            args[0]._origin.watched = True
        rule = _RULES.get(func)
        if rule and isinstance(args[0], cls) and args[0]._made is None and torch.is_grad_enabled():
            promise = rule(*args, **kwargs) if func is F.cross_entropy or not kwargs else None
            if promise is not None:
                return promise
        return func(*_real(args, cls._value), **_real(kwargs, cls._value))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Inside the code of others, which will give a gradient to the promise itself: values alone."""
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} cannot change logits that were not computed.")
        return func(*_real(args, cls._values), **_real(kwargs or {}, cls._values))

    def _value(self) -> Tensor:
        """The logits in their graph."""
        if self._made is None:
            self._origin.make()
        assert self._made is not None
        return self._made

    def _values(self) -> Tensor:
        if self._made is not None:
            return self._made.detach()
        return self._change(self._origin.logits(self._origin.hidden.detach()))


@dataclass(eq=False)
class _Origin:
    """What some promises are of."""

    hidden: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None
    family: list[ref[PromisedLogits]] = field(default_factory=list)
    watched: bool = False
    """Whether somebody wants the gradient that logits get, so that it has to go through them."""

    def promise(self, hidden: Tensor, dtype: torch.dtype, change: Change) -> PromisedLogits:
        made: PromisedLogits = _Promise.apply(hidden, self.weight_VC, dtype)  # type: ignore[no-untyped-call]
        made._origin, made._hidden, made._change, made._made = self, hidden, change, None
        self.family.append(ref(made))
        return made

    def logits(self, hidden: Tensor) -> Tensor:
        with no_autocast(hidden):
            return F.linear(hidden, *self.head)

    @property
    def head(self) -> list[Any]:
        return [
            None if t is None else t.to(self.hidden.dtype) for t in (self.weight_VC, self.bias_V)
        ]

    @torch.enable_grad()
    def make(self) -> None:
        """All at once: whoever asks may change what it gets, and views show that, and copies do not."""
        logits = self.logits(self.hidden)
        for known in self.family:
            member = known()
            if member is not None:
                member._made = member._change(logits)


class _Promise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VC: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight_VC)
        ctx.dtype = hidden.dtype
        shape = (*hidden.shape[:-1], len(weight_VC))
        made: Tensor = Tensor._make_wrapper_subclass(
            PromisedLogits, shape, dtype=dtype, device=hidden.device
        )
        return made

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (weight_VC,) = ctx.saved_tensors
        return outer[0].to(ctx.dtype) @ weight_VC.to(ctx.dtype), None, None


def _real(value: Any, asked: Callable[[PromisedLogits], Tensor]) -> Any:
    """``value`` with what is in place of the promises in it."""
    if isinstance(value, PromisedLogits):
        return asked(value)
    if isinstance(value, dict):
        return {key: _real(item, asked) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_real(item, asked) for item in value)
    return value


# -- what can be said without making them ---------------------------------------------------------------


def _float(logits: PromisedLogits) -> Tensor:
    if logits.dtype == torch.float32:
        return logits
    change = logits._change
    return logits._origin.promise(
        logits._hidden, torch.float32, lambda first: change(first).float()
    )


def _shaped(logits: PromisedLogits, *shape: Any) -> Tensor | None:
    """``view`` and ``reshape`` that leave the last axis alone."""
    sizes: Sequence[Any] = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if isinstance(sizes, torch.dtype) or len(sizes) < 2 or sizes[-1] != logits.shape[-1]:
        return None
    if not logits._hidden.is_contiguous():
        return None
    change = logits._change
    hidden = logits._hidden.view(*sizes[:-1], logits._hidden.shape[-1])
    return logits._origin.promise(hidden, logits.dtype, lambda first: change(first).view(*sizes))


def _item(logits: PromisedLogits, index: Any) -> Tensor | None:
    """A slice of positions: ``[..., a:b, :]``."""
    if not (isinstance(index, tuple) and len(index) == 3 and logits.dim() > 1):
        return None
    if index[0] is not Ellipsis or not isinstance(index[1], slice) or index[2] != slice(None):
        return None
    change = logits._change
    return logits._origin.promise(
        logits._hidden[index], logits.dtype, lambda first: change(first)[index]
    )


def _contiguous(logits: PromisedLogits) -> Tensor:
    if logits._hidden.is_contiguous():
        return logits
    change, hidden = logits._change, logits._hidden.contiguous()
    return logits._origin.promise(hidden, logits.dtype, lambda first: change(first).contiguous())


def _cross_entropy(
    logits: PromisedLogits, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    others = (weight, size_average, reduce)
    if any(other is not None for other in others) or reduction not in ("mean", "sum"):
        return None
    if logits.dim() != 2 or target.shape != logits.shape[:1] or target.dtype != torch.long:
        return None
    origin = logits._origin
    loss: Tensor = _Loss.apply(
        logits._hidden, origin.hidden, target, (logits,), ignore_index, reduction, label_smoothing
    )  # type: ignore[no-untyped-call]
    return loss.to(logits.dtype if autocast_dtype(logits) is None else torch.float32)


class _Loss(torch.autograd.Function):
    """Cross-entropy without logits; with them in the end, where somebody watches their gradient, or takes its own."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, first: Tensor, targets_N: Tensor, logits: tuple[PromisedLogits], ignored: int,
        reduction: str, smoothing: float,
    ) -> Tensor:  # fmt: skip
        index = (targets_N != ignored).nonzero()[:, 0]
        some = len(index) < len(targets_N)
        picked = (hidden_NC[index] if some else hidden_NC.detach()).requires_grad_()
        targets = targets_N[index]
        weight_VC, bias_V = logits[0]._origin.head
        with torch.enable_grad(), no_autocast(picked):
            ones = torch.ones_like(targets, dtype=torch.float32)
            form = Form(smoothing)
            loss = linear_cross_entropy(picked, weight_VC, targets, ones, bias_V, form).loss
        (grad,) = torch.autograd.grad(loss, picked)
        ctx.save_for_backward(grad, index if some else None, targets_N)
        ctx.shape, ctx.divisor = hidden_NC.shape, len(index) if reduction == "mean" else 1
        ctx.logits = logits
        ctx.options = {
            "ignore_index": ignored,
            "reduction": reduction,
            "label_smoothing": smoothing,
        }
        return loss.detach() / ctx.divisor

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grad, index, targets_N = ctx.saved_tensors
        (logits,), twice = ctx.logits, torch.is_grad_enabled()
        if twice or logits._origin.watched:
            with torch.enable_grad():
                made = logits._value()
                wide = made.to(torch.promote_types(made.dtype, torch.float32))
                loss = F.cross_entropy(wide, targets_N, **ctx.options)
            found = torch.autograd.grad(
                loss, logits._origin.hidden, outer[0], retain_graph=True, create_graph=twice
            )
            return None, *found, None, None, None, None, None
        grad = grad * (outer[0] / ctx.divisor).to(grad.dtype)
        whole = grad if index is None else grad.new_zeros(ctx.shape).index_copy_(0, index, grad)
        return whole, None, None, None, None, None, None


_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_nested", "is_mps", "is_xla", "is_quantized",
)  # fmt: skip
_FACTS: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
        Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point,
        Tensor.is_complex, Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
    }
)  # fmt: skip
"""What is known of logits that nobody has made."""
_WATCHES = frozenset(
    {Tensor.retain_grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
)
"""What is wanted of the gradient that logits get."""
_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.float: _float,
    Tensor.view: _shaped,
    Tensor.reshape: _shaped,
    Tensor.__getitem__: _item,
    Tensor.contiguous: _contiguous,
    F.cross_entropy: _cross_entropy,
}
