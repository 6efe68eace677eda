"""Norms and gated products by our kernels: beside plain torch, and beside the families' formulas in float64.

``python -m tests.kernels.blocks`` with TRITON_INTERPRET=1 runs the kernels on the CPU, without a GPU (there bf16 is cut
off instead of rounded); without, it compiles them for GPUs that need not be there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from trimtab.kernels import frozen_blocks, fused_blocks

SHAPES = ((5, 24), (1, 7), (3, 2, 100), (1, 1), (1, 4500), (0, 8))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = ("before", "after", "offset")
KINDS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "silu": (ACT2FN["silu"], F.silu),
    "gelu": (ACT2FN["gelu"], F.gelu),
    "gelu_tanh": (ACT2FN["gelu_pytorch_tanh"], partial(F.gelu, approximate="tanh")),
}
"""The family's module, and the formula."""
EPSILON = 1e-5


def drawn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (2 * values).to(device, dtype)


def differing(device: str) -> list[str]:
    """The cases in which a value lies more than two neighbours from that of plain torch; there should be none."""
    wrong = []
    for (name, ours, plain), dtype in _beside_plain(device):
        size = plain.abs().float()
        most = float(size.max()) if size.numel() else 0.0
        near = max(2 * torch.finfo(dtype).eps, 2e-6) * size + 1e-6 * most + 4e-6
        if ours.shape != plain.shape or ours.dtype != plain.dtype or not ours.is_contiguous():
            wrong.append(f"{name}: {ours.shape} {ours.dtype}")
        elif bool(((ours.float() - plain.float()).abs() > near).any()):
            wrong.append(f"{name}: {(ours.float() - plain.float()).abs().max()}")
    return wrong


def _beside_plain(device: str) -> Iterator[tuple[tuple[str, Tensor, Tensor], torch.dtype]]:
    for shape, dtype in product(SHAPES, DTYPES):
        x, grad = (drawn(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
        weight = drawn(shape[-1], dtype=dtype, device=device, seed=2)
        both = drawn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device, seed=3)
        for rounding in ROUNDINGS:
            ways = [
                _both(partial(frozen_blocks.rms_norm, weight_C=weight, epsilon=EPSILON, rounding=rounding), (x,), grad)  # type: ignore[arg-type]
                for _ in _each_way()
            ]  # fmt: skip
            for what, ours, plain in zip(("y", "dx"), *ways, strict=True):
                yield (f"norm {rounding} {shape} {dtype} {what}", ours, plain), dtype
        for kind, (activation, _) in KINDS.items():
            given = both.chunk(2, dim=-1)  # rows that are not side by side
            ways = [
                _both(partial(frozen_blocks.gated_product, activation=activation), given, grad)
                for _ in _each_way()
            ]
            for what, ours, plain in zip(("y", "dgate", "dup"), *ways, strict=True):
                yield (f"{kind} {shape} {dtype} {what}", ours, plain), dtype


def _each_way() -> Iterator[None]:
    """By the kernels, on whatever device; then by plain torch."""
    before, rows = frozen_blocks.triton_for, frozen_blocks.by_rows
    try:
        frozen_blocks.triton_for, frozen_blocks.by_rows = (lambda _: True), _never
        yield
        frozen_blocks.triton_for, frozen_blocks.by_rows = (lambda _: False), rows
        yield
    finally:
        frozen_blocks.triton_for, frozen_blocks.by_rows = before, rows


def _never(*_: Tensor) -> Any:
    raise AssertionError("plain torch computed it")


def _both(run: Callable[..., Tensor], given: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """What comes out, and the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def inexact(device: str) -> list[str]:
    """The cases that lie farther from the family's formula in float64 than a rounding or two; there should be none."""
    wrong = []
    shape = (3, 5, 200)
    for dtype in DTYPES:
        x, u, grad = (drawn(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3))
        weight = drawn(shape[-1], dtype=dtype, device=device, seed=3)
        for rounding in ROUNDINGS:
            run: Any = partial(
                frozen_blocks.rms_norm, weight_C=weight, epsilon=EPSILON, rounding=rounding
            )  # type: ignore[arg-type]
            family = partial(_family, weight=weight.double() + (rounding == "offset"))
            wrong += _far(f"norm {rounding} {dtype}", run, family, (x,), grad)
        for kind, (activation, formula) in KINDS.items():
            run = partial(frozen_blocks.gated_product, activation=activation)
            wrong += _far(f"{kind} {dtype}", run, lambda g, u, f=formula: f(g) * u, (x, u), grad)
    return wrong


def _family(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight


def _far(name: str, run: Any, family: Any, given: tuple[Tensor, ...], grad: Tensor) -> list[str]:
    ways = _each_way()
    next(ways)
    ours = _both(run, given, grad)
    ways.close()  # type: ignore[attr-defined]
    exact = _both(family, tuple(tensor.double() for tensor in given), grad.double())
    most = max(1.5 * torch.finfo(grad.dtype).eps, 1e-6)
    off = [
        float((mine - right).norm() / right.norm()) for mine, right in zip(ours, exact, strict=True)
    ]
    return [f"{name}: {off}"] if max(off) > most else []


def odd_strides(device: str) -> bool:
    """Whether a transposed input and the gradient of a sum, which lies in one place, are read right."""
    x = drawn(24, 10, dtype=torch.float32, device=device).T
    weight = drawn(24, dtype=torch.float32, device=device)
    for run in (
        partial(frozen_blocks.rms_norm, weight_C=weight, epsilon=EPSILON, rounding="after"),
        lambda given: frozen_blocks.gated_product(given, given, F.silu),
    ):
        ours, plain = ([x.detach().requires_grad_()] for _ in range(2))
        for (given,), _ in zip((ours, plain), _each_way(), strict=True):
            run(given).sum().backward()
        torch.testing.assert_close(ours[0].grad, plain[0].grad, rtol=1e-5, atol=1e-5)
    return True


def repeats(device: str) -> bool:
    """Whether the same tensors give the same bits, as what is made again has to."""
    x = drawn(9, 300, dtype=torch.bfloat16, device=device)
    weight = drawn(300, dtype=torch.bfloat16, device=device)
    made = [
        (fused_blocks.rms_norm(x, weight, EPSILON, "before"), fused_blocks.gated_product(x, x, "gelu"))
        for _ in range(2)
    ]  # fmt: skip
    return all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def operations(device: str) -> None:
    """To torch they are operations like any other: what they say of shapes is so, and nothing is changed in place."""
    x, u, grad = (drawn(4, 3, 20, dtype=torch.bfloat16, device=device, seed=s) for s in range(3))
    weight = drawn(20, dtype=torch.bfloat16, device=device)
    for operation, given in (
        (fused_blocks.rms_norm, (x, weight, EPSILON, "before")),
        (fused_blocks.rms_norm_grad, (x, weight, grad, EPSILON, "before")),
        (fused_blocks.gated_product, (x, u, "silu")),
        (fused_blocks.gated_product_grad, (x, u, grad, "silu")),
    ):
        torch.library.opcheck(operation, given, test_utils=("test_schema", "test_faketensor"))


def check(device: str) -> None:
    """All of it."""
    assert not (wrong := differing(device)), wrong
    assert not (wrong := inexact(device)), wrong
    assert odd_strides(device) and repeats(device)
    operations(device)


def compile_all() -> None:
    """Every kernel for two kinds of GPU, by the assembler that Triton brings."""
    for able, dtype in product((80, 90), ("bf16", "fp32")):
        for width in (128, 4096, frozen_blocks.WIDEST):
            rows = max(fused_blocks.TILE // width, 1)
            sizes = {"ROWS": rows, "WIDTH": width}
            for rounding in ROUNDINGS:
                _compiled(fused_blocks._norm_kernel, able, dtype, {"ROUNDING": rounding, **sizes})
            _compiled(fused_blocks._norm_grad_kernel, able, dtype, {"OFFSET": True, **sizes})
        for kind in KINDS:
            for kernel in (fused_blocks._gated_kernel, fused_blocks._gated_grad_kernel):
                _compiled(kernel, able, dtype, {"KIND": kind, "RUN": fused_blocks.RUN})


def _compiled(kernel: Any, able: int, dtype: str, constants: dict[str, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = {"rows": "i32", "width": "i32", "epsilon": "fp32"}
    kinds = {
        name: "constexpr" if name in constants else "i32" if name.endswith("_step") else numbers.get(name, f"*{dtype}")
        for name in kernel.arg_names
    }  # fmt: skip
    made = triton.compile(
        ASTSource(fn=kernel, signature=kinds, constexprs=constants),
        target=GPUTarget("cuda", able, 32),
        options={"num_warps": 8, "enable_fp_fusion": False},
    )
    assert made.asm["cubin"]


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        check("cpu")
    else:
        compile_all()
