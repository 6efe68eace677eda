"""On a base in bf16: masters stay fp32, computation follows the base, and outputs stay near those in fp32."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from tests.laws.cells import Cell, attached, registered
from tests.tiny import CASES, output


@pytest.mark.parametrize("method", registered())
def test_a_base_in_bf16(method: str) -> None:
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
    loss = narrow(**inputs, labels=labels).loss
    loss.backward()
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
