"""Piggyback is the base with weights set to zero; its gradient is that of the mask; what is shared is bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from trimtab.adapt.bits import packed, unpacked
from trimtab.errors import BaseMismatchError

INPUTS = {"input_ids": torch.arange(3, 11)[None]}


def masked(model: nn.Module, method: tt.Piggyback, seed: int = 0) -> tt.Adapter:
    adapter = tt.attach(model, method, "mask")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.rand(p.shape, generator=draw) * 0.03 - 0.01)
    return adapter


@pytest.mark.parametrize("ternary", [False, True])
def test_the_masked_model_is_the_base_with_weights_multiplied(ternary: bool) -> None:
    model = tiny.llama()
    adapter = masked(model, tt.Piggyback(ternary=ternary))
    other = tiny.llama()
    with torch.no_grad():
        for key, scores in adapter.tensors.items():
            weight = other.get_submodule(key.removesuffix(".piggyback_scores")).weight
            mask = (scores > 5e-3).float()
            weight.mul_(mask - (scores < 0).float() if ternary else mask)
    assert torch.equal(tiny.output(model, INPUTS), tiny.output(other, INPUTS)) or torch.allclose(
        tiny.output(model, INPUTS), tiny.output(other, INPUTS), atol=1e-5
    )


def test_the_gradient_of_the_scores_is_that_of_a_dense_mask_at_its_binary_value() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    model = nn.Sequential(layer)
    adapter = masked(model, tt.Piggyback(targets=("0",)))
    model(x).sin().sum().backward()
    (scores,) = adapter.parameters()
    mask = (scores.detach() > 5e-3).double().requires_grad_()
    y = x @ (layer.weight.detach() * mask).T + layer.bias.detach()
    y.sin().sum().backward()
    assert mask.grad is not None and scores.grad is not None
    torch.testing.assert_close(scores.grad.double(), mask.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gradient", ["mean", "individual"])
def test_the_gradient_can_be_freed_of_the_size_of_the_weights(gradient: str) -> None:
    grads = []
    for kind in ("plain", gradient):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        model = nn.Sequential(layer)
        adapter = masked(model, tt.Piggyback(targets=("0",), gradient=kind))  # type: ignore[arg-type]
        model(torch.ones(2, 6)).sum().backward()
        grads.append(next(iter(adapter.parameters())).grad)
    size = layer.weight.detach().abs()
    divisor: Tensor = size.mean() if gradient == "mean" else size
    assert grads[0] is not None and grads[1] is not None
    torch.testing.assert_close(grads[1], grads[0] / divisor)


def test_edges_of_the_masks() -> None:
    scores = torch.tensor([-0.0, 0.0, 5e-3, 5.1e-3, -1e-9])
    assert tt.Piggyback().mask(scores).tolist() == [0, 0, 0, 1, 0]
    assert tt.Piggyback(ternary=True).mask(scores).tolist() == [0, 0, 0, 1, -1]


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (9, 16)])
def test_bits_come_back(shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    stored = packed(values)
    assert stored.dtype == torch.uint8 and len(stored) == -(-values.numel() // 8)
    assert torch.equal(unpacked(stored, shape).bool(), values)


@pytest.mark.parametrize("ternary", [False, True])
def test_the_form_to_share_has_one_bit_a_weight_and_the_same_function(
    ternary: bool, tmp_path: Path
) -> None:
    model = tiny.llama()
    adapter = masked(model, tt.Piggyback(ternary=ternary))
    shared = tt.exported(adapter, name="shared")
    weights = sum(t.numel() for t in adapter.tensors.values())
    assert shared.nbytes == weights // 8 * (2 if ternary else 1)
    assert shared.count == 0
    shared.save(tmp_path / "shared")
    size = (tmp_path / "shared" / "adapter_model.safetensors").stat().st_size
    assert size < weights // 8 * (2 if ternary else 1) + 16_000
    fresh = tiny.llama()
    tt.attach(fresh, tt.Adapter.load(tmp_path / "shared"))
    assert torch.equal(tiny.output(fresh, INPUTS), tiny.output(model, INPUTS))
    merged = tt.merge(fresh, "shared")
    torch.testing.assert_close(tiny.output(merged, INPUTS), tiny.output(model, INPUTS))


def test_a_mask_of_another_base_is_refused(tmp_path: Path) -> None:
    tt.exported(masked(tiny.llama(), tt.Piggyback())).save(tmp_path / "mask")
    other = tiny.llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(BaseMismatchError):
        tt.attach(other, tt.Adapter.load(tmp_path / "mask"))


def test_training_flips_the_mask_and_leaves_the_base() -> None:
    model = tiny.llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = tt.attach(model, tt.Piggyback(), "mask")
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-3)
    for _ in range(8):
        optimiser.zero_grad()
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        optimiser.step()
    kept = [tt.Piggyback().mask(t).mean() for t in adapter.tensors.values()]
    assert 0 < min(kept) < 1
    tt.detach(model, "mask")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
