"""Products of bf16 matrices in fp32, on machines where those are faster.

x86 processors with AMX multiply bf16 several times as fast as fp32, and AMD's with AVX-512-BF16 twice as fast. Intel's
without AMX have the same instruction at half its rate, older ones none: there a product of bf16 matrices costs up to
twice what it costs to widen them first (benchmarks/results/lora_step.md and lora_step_xeon.md give the rates of both).
Sums are taken in fp32 either way, and what comes out is rounded once.

Legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 22
"""Values of a weight that are widened at a time."""
ROWS = 2048
"""Rows that are widened at a time."""
FEWEST = 64
"""Rows from which on widening the weight is cheap beside the product."""


@cache
def fp32_is_faster() -> bool:
    """Whether this machine multiplies fp32 matrices faster than bf16 ones."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if able.get("architecture") != "x86_64":
        return False
    fast = able.get("amx_bf16") or (able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""))
    return not fast


def many(x: Tensor) -> bool:
    """Whether ``x`` has rows enough for products in fp32 to be faster."""
    return x.numel() >= FEWEST * x.shape[-1]


def widens(x: Tensor) -> bool:
    """Whether products of ``x`` (its rows by the rows or columns of a weight) are taken in fp32."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and many(x)
        and fp32_is_faster()
        and not torch.compiler.is_compiling()
    )


def _plainly(x: Tensor) -> bool:
    """Whether torch is to take a product: where that is no slower, or somebody differentiates it (a gradient of a
    gradient)."""
    return not widens(x) or (x.requires_grad and torch.is_grad_enabled())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products of ``x`` in, where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products of ``x`` are in its own dtype."""
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known else nullcontext()


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``."""
    if _plainly(x):
        return F.linear(x, weight_OI, bias_O)
    wide_OI = widened(weight_OI)
    return _by_rows(x, len(weight_OI), lambda some, out: wide_linear(some, wide_OI, bias_O, out))


def times(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight``."""
    if _plainly(x):
        return x @ weight_OI
    wide_OI = widened(weight_OI)
    return _by_rows(x, weight_OI.shape[1], lambda some, out: wide_times(some, wide_OI, out))


def _by_rows(x: Tensor, width: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A product of all rows, of which only some are wide at a time."""
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(flat), width)
    with no_autocast(x):
        for given, made in zip(flat.split(ROWS), y.split(ROWS), strict=True):
            some = scratch("x", *given.shape).copy_(given)
            made.copy_(product(some, scratch("y", *made.shape)))
    # no view, which autograd would forbid to be written in place
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], width))


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, *shape: int) -> Tensor:
    """Memory in fp32 that is used over and over: new memory would have to be mapped by the system, page by page.
    Whoever asks for the same name next, in this thread, writes over it."""
    count = math.prod(shape)
    held = _scratch.held.get(name)
    if held is None or held.numel() < count:
        with torch.inference_mode(False):
            held = _scratch.held[name] = torch.empty(count)
    return held[:count].view(shape)


def widened(weight_OI: Tensor) -> Tensor:
    """In fp32 (in `scratch`), unless it is so large that `wide_linear` and `wide_times` widen it by blocks."""
    return weight_OI if weight_OI.numel() > BLOCK else _wide(weight_OI)


def _wide(weight_OI: Tensor) -> Tensor:
    if weight_OI.dtype == torch.float32:
        return weight_OI
    return scratch("weight", *weight_OI.shape).copy_(weight_OI)


def wide_linear(
    x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias`` of an fp32 x, in fp32; a large weight is widened by blocks of rows."""
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI)) if out is None else out
    rows = max(BLOCK // weight_OI.shape[1], 1)
    for y, weight in zip(y_NO.split(rows, dim=1), weight_OI.split(rows), strict=True):
        torch.mm(x_NI, _wide(weight).T, out=y)
    return y_NO if bias_O is None else y_NO.add_(bias_O)


def wide_times(
    x_NO: Tensor, weight_OI: Tensor, out: Tensor | None = None, *, add: bool = False
) -> Tensor:
    """``x @ weight`` of an fp32 x, in fp32 (to ``add`` to what is there); likewise."""
    y_NI = x_NO.new_empty(len(x_NO), weight_OI.shape[1]) if out is None else out
    rows = max(BLOCK // weight_OI.shape[1], 1)
    for number, (x, weight) in enumerate(
        zip(x_NO.split(rows, dim=1), weight_OI.split(rows), strict=True)
    ):
        y_NI.addmm_(x, _wide(weight), beta=0 if number == 0 and not add else 1)
    return y_NI


def frozen_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`linear` of a frozen weight and bias, with a gradient for x alone."""
    found: Tensor = _FrozenLinear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return found


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (weight_OI,) = ctx.saved_tensors
        return times(outer[0], weight_OI), None, None
