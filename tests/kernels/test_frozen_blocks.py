"""Norms and gated products that keep little: forwards of the families bit for bit, and gradients beside theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from trimtab.kernels import frozen_blocks
from trimtab.kernels.frozen_blocks import gated_product, rms_norm

NORMS = [(LlamaRMSNorm, "before"), (Olmo2RMSNorm, "after"), (GemmaRMSNorm, "offset")]
SHAPES = [(3, 5, 24), (2, 700, 192), (1, 1, 8)]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(kind: Any, width: int, dtype: torch.dtype) -> nn.Module:
    made: nn.Module = kind(width, eps=1e-5)
    made.weight.data = 0.3 * drawn(width, dtype=torch.float32, seed=1) + (kind is not GemmaRMSNorm)
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "rounding"), NORMS)
def test_a_norm_is_the_familys(kind: Any, rounding: Any, shape: Any, dtype: torch.dtype) -> None:
    module = norm(kind, shape[-1], dtype)
    x, grad = drawn(*shape, dtype=dtype) * 3, drawn(*shape, dtype=dtype, seed=2)
    ours, theirs, exact = (x.clone().requires_grad_() for _ in range(3))
    y = rms_norm(ours, module.weight, 1e-5, rounding)  # type: ignore[arg-type]
    assert torch.equal(y, module(theirs))
    y.backward(grad)
    module(theirs).backward(grad)
    wide = norm(kind, shape[-1], torch.float32)
    wide.weight.data = module.weight.data.float()
    exact.data = exact.data.float()
    (want,) = torch.autograd.grad(wide(exact), exact, grad.float())
    assert ours.grad is not None and theirs.grad is not None and module.weight.grad is None
    mine, other = ((t.float() - want).norm() / want.norm() for t in (ours.grad, theirs.grad))
    assert mine <= max(1.05 * float(other), 1e-6), "no farther from fp32 than the family's own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu"])
def test_a_gated_product_is_the_familys(name: str, dtype: torch.dtype) -> None:
    activation = ACT2FN[name]
    both, grad = drawn(2, 700, 400, dtype=dtype), drawn(2, 700, 200, dtype=dtype, seed=1)
    found = []
    for ours in (True, False):
        given = both.clone().requires_grad_()
        gate, up = given.chunk(2, dim=-1)  # views that are not contiguous
        y = gated_product(gate, up, activation) if ours else activation(gate) * up
        y.backward(grad)
        found.append((y.detach(), given.grad))
    for mine, other in zip(*found, strict=True):
        assert mine is not None and other is not None
        # a vectorised exponential and that of a remainder may differ in the last bit
        torch.testing.assert_close(mine, other, rtol=1e-6 if name == "quick_gelu" else 0, atol=0)


def test_blocks_of_rows_cover_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(7, 24, dtype=torch.float32), drawn(24, dtype=torch.float32, seed=1)
    found = []
    for size in (1, 3 * 24, 1 << 20):  # a row at a time, three with a rest, all
        monkeypatch.setattr(frozen_blocks, "BLOCK", size)
        given = x.clone().requires_grad_()
        y = gated_product(rms_norm(given, weight, 1e-6, "after"), given, torch.nn.functional.silu)
        y.square().sum().backward()
        found.append((y.detach(), given.grad))
    for y, grad in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-5, atol=1e-5)


def test_what_is_kept() -> None:
    x, weight = drawn(4, 32, dtype=torch.bfloat16).requires_grad_(), torch.ones(32).bfloat16()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6, "before")
        assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
        kept.clear()
        up = x * 2
        kept.clear()
        gated_product(x, up, torch.nn.functional.silu)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), up.data_ptr()}
