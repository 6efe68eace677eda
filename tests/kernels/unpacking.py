"""Our own kernels beside plain torch: every value of every format, shape and dtype.

``python -m tests.kernels.unpacking`` with TRITON_INTERPRET=1 runs the kernels on the CPU, without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from trimtab.kernels import eightbit, fused
from trimtab.kernels.fourbit import TABLES, FourBit, block_scales, quantise, unpacked

SHAPES = ((160, 128), (33, 70), (7, 9), (1, 1), (5, 0))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def differing(device: str) -> list[str]:
    """The cases in which a value differs; there should be none."""
    return [name for name, ours, plain in _cases(device) if not torch.equal(ours, plain)]


def _cases(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    torch.manual_seed(0)
    for shape, kind, nested, block in product(SHAPES, TABLES, (True, False), (64, 2, 4096)):
        if shape[-1] == 0 and nested:
            continue  # no scales, no mean of them
        packed = quantise(torch.randn(shape, device=device), kind, nested=nested, block=block)  # type: ignore[arg-type]
        scales = block_scales(packed)
        for dtype in DTYPES:
            name = f"{kind} {shape} nested={nested} block={block} {dtype}"
            plain = _rounded(unpacked(packed, scales, torch.float32), dtype)
            yield name, four_bit(packed, dtype), plain
    for shape, dtype in product(((37, 53), (3, 4096), (1, 1), (0, 5)), DTYPES):
        codes, scales = eightbit.quantise_rows(torch.randn(shape, device=device))
        plain = _rounded(eightbit.unpacked_rows(codes, scales, torch.float32), dtype)
        yield f"int8 {shape} {dtype}", fused.eight_bit_rows(codes, scales, dtype), plain
        across = codes.T.contiguous().T
        yield f"int8 {shape} {dtype} across", fused.eight_bit_rows(across, scales, dtype), plain


def four_bit(packed: FourBit, dtype: torch.dtype) -> Tensor:
    """Ours."""
    parts = (packed.codes, packed.scales, packed.outer, packed.mean)
    found: Tensor = fused.four_bit(*parts, packed.kind, packed.block, packed.shape, dtype)
    return found


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels round: a GPU to the nearest; the interpreter cuts bf16 off."""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        values = (values.view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def breaks_no_graph(device: str) -> bool:
    """Whether it is compiled without a break, to the same values."""
    packed = quantise(torch.randn(64, 64, device=device))
    x = torch.randn(3, 64, device=device)

    def product(x: Tensor) -> Tensor:
        return x @ four_bit(packed, torch.float32).T

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    return torch.equal(compiled(x), product(x))


if __name__ == "__main__":
    wrong = differing("cpu")
    assert not wrong, wrong
    assert breaks_no_graph("cpu")
