"""DoRA's norm: equal to the dense one, never built, computed as seldom as can be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from trimtab.frozen import Layer, view
from trimtab.frozen import layer as frozen_layer

LAYERS = {
    "linear": lambda: nn.Linear(24, 10),
    "conv1d-hf": lambda: Conv1D(10, 24),
    "embedding": lambda: nn.Embedding(24, 10),
    "conv1": lambda: nn.Conv1d(6, 10, 3),
    "grouped": lambda: nn.Conv1d(8, 6, 3, groups=2),
    "conv2": lambda: nn.Conv2d(3, 10, (3, 2)),
    "conv3": lambda: nn.Conv3d(2, 5, 2),
}


def made(kind: str, dtype: torch.dtype) -> tuple[Layer, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = view(LAYERS[kind]().to(dtype))
    assert layer is not None
    a, b = (torch.randn(shape).to(dtype) * 0.3 for shape in layer.factor_shapes(4))
    return layer, a, b


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)],
    ids=["fp64", "fp32", "bf16"],
)
@torch.no_grad()
def test_the_norm_is_that_of_the_dense_sum(
    kind: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_layer, "PIECE", 50)  # bf16 is widened in several pieces
    layer, a, b = made(kind, dtype)
    dense = layer.dense().double() + layer.product(a.double(), b.double())
    exact = dense.flatten(1).norm(dim=1)
    found = layer.edited_row_norms(a, b)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(
        layer.row_norms().double(), layer.dense().double().flatten(1).norm(dim=1), rtol=1e-6, atol=0
    )


def test_a_sum_that_vanishes_has_norm_zero_and_not_nan() -> None:
    layer, _, _ = made("linear", torch.float32)
    u, s, v = torch.linalg.svd(layer.dense().detach(), full_matrices=False)
    norms = layer.edited_row_norms(v, -u * s)
    assert bool((norms >= 0).all()) and bool((norms < 1e-2).all())


class Watch(TorchDispatchMode):
    """Counts operations, and the largest tensor that one of them made in memory of its own."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return out


def step(model: nn.Module, x: Tensor) -> Watch:
    with Watch(*model.parameters()) as watch:
        model(x).square().sum().backward()
    return watch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_step_makes_a_tensor_of_the_size_of_the_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_layer, "PIECE", 1 << 12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 128)).to(dtype)
    tt.attach(model, tt.DoRA(rank=2, targets="0"), "a")
    x = torch.randn(3, 192, dtype=dtype)
    step(model, x)  # ‖W‖² is found once
    watch = step(model, x)
    assert watch.largest < 128 * 192 / 2, watch.largest
    assert not any("norm" in name for name in watch.calls), watch.calls


def test_the_factor_is_kept_without_gradients_until_a_tensor_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    adapter = tt.attach(model, tt.DoRA(rank=2, targets="0"), "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    x = torch.randn(3, 16)
    expected = model(x)

    def products() -> tuple[int, Tensor]:
        with torch.no_grad(), Watch() as watch:
            y = model(x)
        return sum(watch.calls[name] for name in ("mm", "bmm", "addmm", "addmm_", "sqrt")), y

    first, again = products(), products()
    assert again[0] == 3 < first[0]  # the layer and its two factors
    assert torch.equal(again[1], expected)
    for tensor in (adapter.tensors["0.lora_magnitude_vector.weight"], model[0].base_layer.weight):
        with torch.no_grad():
            tensor.mul_(2.0)
        assert products()[0] > 3
        torch.testing.assert_close(products()[1], model(x))
