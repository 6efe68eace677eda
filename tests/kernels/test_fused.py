"""Triton's kernels give what plain torch gives: interpreted on the CPU where Triton is installed, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from trimtab.kernels import accelerators
from trimtab.kernels.fourbit import block_scales, dequantise, quantise, unpacked

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_interpreted_every_value_is_that_of_plain_torch() -> None:
    """In a process of its own: whether a kernel is interpreted is settled when it is defined."""
    path = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.unpacking"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def test_triton_is_not_imported_before_there_is_a_cuda_tensor() -> None:
    code = (
        "import sys, torch, trimtab\n"
        "from trimtab.kernels import eightbit, fourbit\n"
        "fourbit.dequantise(fourbit.quantise(torch.randn(64, 64)))\n"
        "eightbit.dequantise_rows(*eightbit.quantise_rows(torch.randn(4, 4)), torch.float32)\n"
        "assert 'trimtab.kernels.fused' not in sys.modules\n"
    )
    path = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_where_triton_does_not_run_plain_torch_computes() -> None:
    """Not on a CPU; without a C compiler or for an unknown GPU neither."""
    with pytest.warns(UserWarning, match="Triton is installed and does not run on cpu"):
        assert not accelerators._runs.__wrapped__(torch.device("cpu"))


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_every_value_is_that_of_plain_torch() -> None:
    from tests.kernels.unpacking import breaks_no_graph, differing

    assert not differing("cuda")
    assert breaks_no_graph("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 384), (33, 70)])
def test_on_a_gpu_whatever_unpacks_gives_plain_torch_s_values(shape: tuple[int, int]) -> None:
    """Within one rounding: bitsandbytes may unpack here."""
    packed = quantise(torch.randn(shape, device="cuda"))
    for dtype in (torch.float32, torch.bfloat16):
        plain = unpacked(packed, block_scales(packed), dtype)
        torch.testing.assert_close(
            dequantise(packed, dtype), plain, rtol=torch.finfo(dtype).eps, atol=0
        )
