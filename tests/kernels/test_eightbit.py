"""Eight-bit weights: the error that rounding allows, and no more."""

from __future__ import annotations

import pytest
import torch

from trimtab.kernels.eightbit import (
    dequantise_blocks,
    dequantise_rows,
    quantise_blocks,
    quantise_rows,
)


@pytest.mark.parametrize("shape", [(5, 7), (300, 130), (128, 128), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_half_a_step_off_at_most(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantise_rows(weight)
    back = dequantise_rows(codes, scales, torch.float32)
    assert codes.dtype == torch.int8
    assert (back - weight.float()).abs().div(scales[:, None]).max() <= 0.5 + 1e-4
    again, _ = quantise_rows(back)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("shape", [(5, 7), (300, 130), (128, 128)])
def test_fp8_is_within_its_fraction(shape: tuple[int, int]) -> None:
    """Three bits of fraction: a sixteenth of the value, or half of the smallest step."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise_blocks(weight)
    back = dequantise_blocks(codes, scales, torch.float32)
    each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    allowed = (weight.abs() / 16).maximum(each * 2**-10) * (1 + 1e-5)
    assert bool(((back - weight).abs() <= allowed).all())


def test_empty_rows_and_blocks_stay_empty() -> None:
    weight = torch.zeros(130, 130)
    weight[0, 0] = 3.0
    assert torch.equal(dequantise_rows(*quantise_rows(weight), torch.float32), weight)
    assert torch.equal(dequantise_blocks(*quantise_blocks(weight), torch.float32), weight)
