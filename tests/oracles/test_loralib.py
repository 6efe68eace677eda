"""Against loralib, the reference code of LoRA: the same factors give the same outputs, gradients and weights."""

from __future__ import annotations

from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from tests.oracles import kit

RANK, ALPHA = 3, 5


def attached(
    layer: nn.Module, rank: int = RANK, alpha: float = ALPHA
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Our layer in a model of one, in fp64, and its tensors by their last names."""
    model = nn.Sequential(layer)
    adapter = tt.attach(model, tt.LoRA(rank=rank, alpha=alpha, targets="0"), "x")
    model.double()
    return model, {
        key.removeprefix("0.").removesuffix(".weight"): t for key, t in adapter.tensors.items()
    }


@torch.no_grad()
def filled(layer: Any) -> Any:
    """loralib's layer with values of every parameter, in fp64, not merged."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer.double()


def assert_merges_alike(
    model: nn.Module, theirs: Any, x: Tensor, weight: Tensor, transposed: bool = False
) -> None:
    """loralib merges into its weight at eval; our merged layer has that very weight."""
    theirs.eval()
    merged = tt.merge(model, "x")
    found = merged[0].weight.T if transposed else merged[0].weight
    kit.assert_close(found, weight, "merged weight")
    kit.assert_close(merged(x), theirs(x), "merged outputs")


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    theirs = filled(loralib.Linear(6, 4, r=RANK, lora_alpha=ALPHA, bias=bias))
    layer = nn.Linear(6, 4, bias=bias).double()
    layer.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora" not in k})
    model, ours = attached(layer)
    with torch.no_grad():
        ours["lora_A"].copy_(theirs.lora_A), ours["lora_B"].copy_(theirs.lora_B)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    kit.assert_close(model(x), theirs(x), "outputs")
    kit.objective(model(x)).backward()
    kit.objective(theirs(x)).backward()
    kit.assert_close(ours["lora_A"].grad, theirs.lora_A.grad, "A")
    kit.assert_close(ours["lora_B"].grad, theirs.lora_B.grad, "B")
    assert_merges_alike(model, theirs, x, theirs.weight)


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding: int | None) -> None:
    theirs = filled(loralib.Embedding(9, 4, r=RANK, lora_alpha=ALPHA, padding_idx=padding))
    layer = nn.Embedding(9, 4, padding_idx=padding).double()
    layer.load_state_dict({"weight": theirs.weight})
    model, ours = attached(layer)
    with torch.no_grad():
        ours["lora_embedding_A"].copy_(theirs.lora_A), ours["lora_embedding_B"].copy_(theirs.lora_B)
    x = torch.tensor([[1, 2, 8], [2, 2, 0]])
    kit.assert_close(model(x), theirs(x), "outputs")
    kit.objective(model(x)).backward()
    kit.objective(theirs(x)).backward()
    kit.assert_close(ours["lora_embedding_A"].grad, theirs.lora_A.grad, "A")
    kit.assert_close(ours["lora_embedding_B"].grad, theirs.lora_B.grad, "B")
    assert_merges_alike(model, theirs, x, theirs.weight)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True, False]])
def test_merged_linear(enabled: list[bool]) -> None:
    """loralib's factors of a fused layer, one pair per enabled slice, are one pair with a block-diagonal B."""
    theirs = loralib.MergedLinear(
        6, 12, r=RANK, lora_alpha=ALPHA, enable_lora=enabled, fan_in_fan_out=True
    )
    theirs = filled(theirs)
    theirs.lora_ind = theirs.lora_ind.bool()
    layer = Conv1D(12, 6).double()
    layer.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    count = sum(enabled)
    model, ours = attached(layer, rank=RANK * count, alpha=ALPHA * count)
    with torch.no_grad():
        ours["lora_A"].copy_(theirs.lora_A)
        ours["lora_B"].zero_()
        slices = [number for number, on in enumerate(enabled) if on]
        for number, (place, b) in enumerate(zip(slices, theirs.lora_B.chunk(count), strict=True)):
            ours["lora_B"][4 * place : 4 * place + 4, RANK * number : RANK * (number + 1)] = b
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    merged = tt.merge(model, "x")
    kit.assert_close(merged(x), model(x), "ours")
    theirs.eval()  # its unmerged forward with fan_in_fan_out multiplies transposed factors; the merged one is right
    kit.assert_close(model(x), theirs(x), "outputs")
    kit.assert_close(merged[0].weight, theirs.weight, "merged weight")


@pytest.mark.parametrize(("dims", "groups"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_convolution(dims: int, groups: int) -> None:
    """loralib reshapes a product of (out·k, r·k) and (r·k, in·k) into the kernel; PEFT and we convolve to r
    channels and then 1×1. The factors are not each other's, so ΔW is what is compared: ours spells loralib's
    exactly at full rank (B the identity of each group, A the kernel itself).
    """
    kind = {
        1: (loralib.Conv1d, nn.Conv1d),
        2: (loralib.Conv2d, nn.Conv2d),
        3: (loralib.Conv3d, nn.Conv3d),
    }[dims]
    if dims == 3:
        # loralib's shapes have one k too few for three dimensions: it cannot even be made to run.
        with pytest.raises(RuntimeError, match="invalid for input"):
            filled(kind[0](4, 6, 3, r=2))(torch.randn(1, 4, 5, 5, 5, dtype=torch.float64))
        return
    if dims == 1:
        # and one too many for one dimension.
        with pytest.raises(RuntimeError, match="invalid for input"):
            filled(kind[0](4, 6, 3, r=2))(torch.randn(1, 4, 9, dtype=torch.float64))
        return
    theirs = filled(kind[0](4, 6, 3, r=2, lora_alpha=ALPHA, stride=2, padding=1, groups=groups))
    layer = kind[1](4, 6, 3, stride=2, padding=1, groups=groups).double()
    layer.load_state_dict(theirs.conv.state_dict())
    model, ours = attached(layer, rank=6, alpha=6)
    change = (theirs.lora_B @ theirs.lora_A).view(theirs.conv.weight.shape) * theirs.scaling
    with torch.no_grad():
        ours["lora_A"].copy_(change)
        identity = torch.eye(6 // groups, dtype=torch.float64).repeat(groups, 1)
        ours["lora_B"].copy_(identity[..., None, None])
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    kit.assert_close(model(x), theirs(x), "outputs")
    assert_merges_alike(model, theirs, x, theirs.conv.weight)


def test_initial_values_are_distributed_as_in_loralib() -> None:
    """A uniform in ±1/√in and B zero; for an embedding A zero and B standard normal."""
    torch.manual_seed(0)
    theirs = loralib.Linear(400, 300, r=64)
    _, ours = attached(nn.Linear(400, 300), rank=64)
    for side in (theirs.lora_A, ours["lora_A"]):
        assert side.abs().max() <= 400**-0.5
        assert side.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)
    assert not theirs.lora_B.any() and not ours["lora_B"].any()
    theirs = loralib.Embedding(50, 300, r=64)
    _, ours = attached(nn.Embedding(50, 300), rank=64)
    for side in (theirs.lora_B, ours["lora_embedding_B"]):
        assert side.std().item() == pytest.approx(1, rel=0.02)
    assert not theirs.lora_A.any() and not ours["lora_embedding_A"].any()
