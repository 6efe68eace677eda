"""A layer and its low-rank change in one operation are the layer and its change: every family and storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trimtab as tt
from tests.laws.test_laws import close, gradients
from tests.tiny import CASES, output
from trimtab.adapt import fusing

METHODS = ("lora(rank=3)", "lora(rank=2, dropout=0.3, rslora=True)", "dora(rank=3)")
OUTPUT = fusing.output


def _noted(times: list[bool], *, apart: bool) -> Callable[..., Any]:
    """`fusing.output` (or none of it), that notes whether it did anything."""

    def noted(*given: Any) -> Any:
        made = None if apart else OUTPUT(*given)
        times.append(made is not None)
        return made

    return noted


@pytest.mark.parametrize("rows", [None, ["a", None, "a", "b"]], ids=["one adapter", "of each row"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [name for name in CASES if name != "mixed"])
def test_values_and_gradients(
    family: str, method: str, rows: list[str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusing, "FEWEST", 1)
    found = []
    for apart in (True, False):
        times: list[bool] = []
        monkeypatch.setattr(fusing, "output", _noted(times, apart=apart))
        model, inputs = CASES[family].model().train(), CASES[family].inputs()
        adapter, other = (tt.attach(model, method, name) for name in ("a", "b"))
        with torch.no_grad():
            for number, parameter in enumerate([*adapter.parameters(), *other.parameters()]):
                generator = torch.Generator().manual_seed(number)
                parameter += torch.randn(parameter.shape, generator=generator) / 10
        torch.manual_seed(3)
        with tt.using(model, "a") if rows is None else tt.rows(model, rows):
            loss = output(model, inputs).tanh().sum()
        loss.backward()
        found.append((loss.detach(), gradients(adapter)))
        assert any(times) is not apart
    (want, plain), (got, ours) = found
    assert close(want, got)
    for key, gradient in plain.items():
        mine = ours[key]
        assert gradient is not None and mine is not None
        assert close(gradient, mine), key
