"""On a base in bf16: masters stay fp32, computation follows the base, and outputs stay near those in fp32."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import trimtab as tt
from tests.laws.cells import Cell, attached, registered
from tests.tiny import CASES, output
from trimtab.adapt.lean import plainly
from trimtab.kernels import products


@pytest.mark.parametrize("wide_products", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize("method", registered())
def test_a_base_in_bf16(method: str, wide_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["llama"]
    cell, inputs = Cell(method, "llama"), case.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    wide = case.model(torch.float32)
    attached(cell, wide)
    narrow = case.model(torch.bfloat16)
    adapter = attached(cell, narrow)
    with torch.no_grad():
        expected, found = output(wide, inputs), output(narrow, inputs)
        assert found.dtype == torch.bfloat16
        distance = (found.float() - expected).norm() / expected.norm()
    assert float(distance) < 0.2
    narrow.train()
    monkeypatch.setattr(products, "fp32_is_faster", lambda: wide_products)
    monkeypatch.setattr(products, "FEWEST", 1)
    found_by = []
    for way in (plainly, nullcontext):  # the families' own code, and ours
        torch.manual_seed(3)
        with way():
            loss = narrow(**inputs, labels=labels).loss
        narrow.zero_grad()
        loss.backward()
        every = [p.grad.flatten().double() for p in adapter.parameters() if p.grad is not None]
        found_by.append((float(loss.detach()), torch.cat(every)))
    (plain_loss, plain), (own_loss, own) = found_by
    assert own_loss == pytest.approx(plain_loss, rel=0.01)
    assert torch.cosine_similarity(plain, own, dim=0) > 0.9
    trained = [p for p in adapter.parameters() if p.grad is not None]
    assert trained
    for parameter in trained:
        assert parameter.dtype == torch.float32 == parameter.grad.dtype
        assert bool(parameter.grad.isfinite().all())
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters() if not p.requires_grad)
    merges = not any(m.unmergeable for m in adapter.methods)
    if merges:
        narrow.eval()
        merged = tt.merge(narrow, "a")
        with torch.no_grad():
            near = (output(merged, inputs).float() - found.float()).norm() / found.float().norm()
        assert float(near) < 0.2
