"""A layer and its low-rank change in one operation are the layer and its change: every family and storage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import trimtab as tt
from tests.laws.test_laws import close, gradients
from tests.tiny import CASES, output
from trimtab.adapt.site import LayerSite

METHODS = ("lora(rank=3)", "lora(rank=2, dropout=0.3, rslora=True)", "dora(rank=3)")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [name for name in CASES if name != "mixed"])
def test_values_and_gradients(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    fused = LayerSite._fused
    for apart in (True, False):
        times: list[bool] = []

        def noted(site: LayerSite, *given: object, apart: bool = apart) -> Tensor | None:
            y = None if apart else fused(site, *given)  # type: ignore[arg-type]
            times.append(y is not None)
            return y

        monkeypatch.setattr(LayerSite, "_fused", noted)
        model, inputs = CASES[family].model().train(), CASES[family].inputs()
        adapter = tt.attach(model, method, "a")
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter += torch.randn(parameter.shape, generator=generator) / 10
        torch.manual_seed(3)
        loss = output(model, inputs).tanh().sum()
        loss.backward()
        found.append((loss.detach(), gradients(adapter)))
        assert any(times) is not apart
    (want, plain), (got, ours) = found
    assert close(want, got)
    for key, gradient in plain.items():
        other = ours[key]
        assert gradient is not None and other is not None
        assert close(gradient, other), key
