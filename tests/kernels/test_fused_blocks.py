"""Triton's norms and gated products: interpreted where Triton is installed, compiled for GPUs, and on one."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from trimtab.kernels import frozen_blocks
from trimtab.kernels.activations import kind_of
from trimtab.kernels.frozen_blocks import gated_product, rms_norm

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def ran(*arguments: str, **environment: str) -> None:
    path = os.pathsep.join(one for one in sys.path if one)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


@needs_triton
def test_interpreted_they_are_those_of_plain_torch_and_of_the_formula() -> None:
    """In a process of its own: whether a kernel is interpreted is settled when it is defined."""
    ran("-m", "tests.kernels.blocks", TRITON_INTERPRET="1")


@needs_triton
def test_they_compile_for_gpus() -> None:
    ran("-m", "tests.kernels.blocks", TRITON_INTERPRET="0")


@pytest.mark.gpu
@needs_triton
def test_on_a_gpu_they_are_those_of_plain_torch_and_of_the_formula() -> None:
    from tests.kernels.blocks import check

    check("cuda")


def test_triton_is_not_imported_before_there_is_a_cuda_tensor() -> None:
    ran("-c", (
        "import sys, torch, trimtab\n"
        "from trimtab.kernels.frozen_blocks import gated_product, rms_norm\n"
        "x = torch.randn(3, 8, requires_grad=True)\n"
        "gated_product(rms_norm(x, torch.ones(8), 1e-6, 'after'), x, torch.nn.functional.silu).sum().backward()\n"
        "assert 'trimtab.kernels.fused_blocks' not in sys.modules\n"
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        (ACT2FN["silu"], "silu"), (ACT2FN["swish"], "silu"), (F.silu, "silu"), (nn.SiLU(inplace=True), None),
        (ACT2FN["gelu"], "gelu"), (ACT2FN["gelu_python"], None), (nn.GELU(), "gelu"), (F.gelu, "gelu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"), (ACT2FN["gelu_python_tanh"], None),
        (nn.GELU("tanh"), "gelu_tanh"), (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (partial(F.gelu, approximate="none"), None), (ACT2FN["gelu_new"], None), (ACT2FN["gelu_fast"], None),
        (ACT2FN["quick_gelu"], None), (ACT2FN["relu"], None), (lambda x: x, None),
    ],
)  # fmt: skip
def test_which_activations_the_kernels_know(activation: Any, kind: str | None) -> None:
    assert kind_of(activation) == kind


def test_elsewhere_than_on_a_cpu_plain_torch_takes_all_rows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_blocks, "BLOCK", 1)
    x, weight = (torch.ones(*shape, device="meta") for shape in ((7, 24), (24,)))
    assert len(list(frozen_blocks.by_rows(x, x))) == 1
    x.requires_grad_()
    y = gated_product(rms_norm(x, weight, 1e-6, "before"), x, F.silu)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == grad.shape == x.shape
