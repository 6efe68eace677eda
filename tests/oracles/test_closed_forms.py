"""Changes of a weight against the formulas of their papers, written out with loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.adapt.contract import Params
from trimtab.frozen import view
from trimtab.methods.lokr import split


def tensors(method: tt.MoRA, layer: nn.Linear) -> Params:
    seen = view(layer)
    assert seen is not None
    draw = torch.Generator().manual_seed(0)
    specs = method.tensors(seen, "")
    return {n: torch.randn(s.shape, generator=draw, dtype=torch.float64) for n, s in specs.items()}


def rotated(x_S: Tensor, position: int) -> Tensor:
    """Rotary embedding of one vector, halves paired."""
    half = len(x_S) // 2
    out = torch.empty_like(x_S)
    for k in range(half):
        angle = position * 10000 ** (-k / half)
        a, b = x_S[k], x_S[k + half]
        out[k] = a * math.cos(angle) - b * math.sin(angle)
        out[k + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


@pytest.mark.parametrize(("into", "out"), [(12, 12), (13, 29), (29, 13), (7, 40)])
@pytest.mark.parametrize("variant", ["sharing", "rotation"])
def test_mora_compresses_multiplies_and_expands(into: int, out: int, variant: str) -> None:
    layer = nn.Linear(into, out, dtype=torch.float64)
    method = tt.MoRA(rank=1, variant=variant)  # type: ignore[arg-type]
    p = tensors(method, layer)
    side = len(p["M"])
    assert side == (round(math.sqrt(into + out)) // (2 if variant == "rotation" else 1)) * (
        2 if variant == "rotation" else 1
    )
    x = torch.randn(into, dtype=torch.float64)
    wrapped = torch.cat([x, x, x])[: -(-into // side) * side].view(-1, side)
    if variant == "sharing":
        parts = [p["M"] @ wrapped.sum(0)]
    else:
        parts = [p["M"] @ rotated(group, number) for number, group in enumerate(wrapped)]
    once = torch.cat(parts)
    expected = torch.cat([once] * (out // len(once) + 1))[:out]
    seen = view(layer)
    assert seen is not None
    torch.testing.assert_close(method.change(p, seen) @ x, expected)


@pytest.mark.parametrize(
    ("size", "factor", "parts"),
    [(256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (4, 4, (4, 1)), (10, 3, (2, 5))],
)  # fmt: skip
def test_lokr_splits_sides_as_lycoris_does(size: int, factor: int, parts: tuple[int, int]) -> None:
    assert split(size, factor) == parts


def test_fourierft_starts_where_its_paper_does_or_at_zero() -> None:
    layer = view(nn.Linear(9, 7))
    assert layer is not None
    for init, still in (("normal", False), ("zeros", True)):
        spec = tt.FourierFT(entries=5, init=init).tensors(layer, "")["spectrum"]  # type: ignore[arg-type]
        value = spec.init(spec.shape, torch.Generator().manual_seed(0))
        assert bool((value == 0).all()) == still


def test_randlora_and_vera_share_and_redraw_their_bases() -> None:
    """Neither stores its random matrices; PEFT's RandLoRA writes gigabytes of them by default."""
    from tests import tiny

    for method in (tt.VeRA(rank=8), tt.RandLoRA(rank=8)):
        model = tiny.llama()
        adapter = tt.attach(model, method, "a")
        assert not any(name.path == "" for name in adapter.named())
        assert len(adapter.drawn) == 2
        drawn = [name for name, _ in model.named_buffers() if name.startswith("trimtab.")]
        assert len(drawn) == 2 and not set(drawn) & set(model.state_dict())
