"""The sparse map and its gradients against the twin that scatters into a dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels import sparse
from trimtab.kernels.sparse import sparse_linear, sparse_linear_reference


def given(dtype: torch.dtype, places: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack(
        [torch.randint(0, size, (places,), generator=generator) for size in (4, 7)]
    ).int()
    indices[:, -1] = indices[:, 0]  # two values at one place add up
    x = torch.randn(2, 5, 7, generator=generator).to(dtype).requires_grad_()
    return x, indices, torch.randn(places, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("few", [1, sparse.SPARSE])
@pytest.mark.parametrize("chunk", [sparse.CHUNK, 1, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_equals_its_twin(
    dtype: torch.dtype, chunk: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    monkeypatch.setattr(sparse, "SPARSE", few)  # each value by itself, or blocks of rows
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.3}[dtype]
    x, indices, values = given(dtype)
    for function in (sparse_linear, sparse_linear_reference):
        out = function(x, indices, values, 4)
        out.square().sum().backward()
        found = [out.detach(), x.grad, values.grad]
        x.grad = values.grad = None
        if function is sparse_linear:
            first = found
    for mine, twin in zip(first, found, strict=True):
        assert mine is not None and twin is not None and mine.dtype == dtype
        torch.testing.assert_close(mine, twin, atol=tolerance, rtol=tolerance)


def test_its_gradients_are_right_to_the_second_place() -> None:
    x, indices, values = given(torch.float64)
    assert torch.autograd.gradcheck(lambda a, v: sparse_linear(a, indices, v, 4), (x, values))
    torch.library.opcheck(
        torch.ops.trimtab.sparse_linear.default, (x.detach()[0], indices, values.detach(), 4)
    )


def test_no_rows_and_frozen_sides() -> None:
    x, indices, values = given(torch.float32)
    assert sparse_linear(x[:, :0], indices, values, 4).shape == (2, 0, 4)
    sparse_linear(x.detach(), indices, values, 4).sum().backward()
    assert x.grad is None and values.grad is not None
    sparse_linear(x, indices, values.detach(), 4).sum().backward()
    assert x.grad is not None


def test_no_dense_matrix_is_kept_for_backward() -> None:
    x, indices, values = given(torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        sparse_linear(x, indices, values, 4)
    assert sum(saved) == x.numel() + indices.numel() + values.numel()
