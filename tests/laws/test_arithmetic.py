"""Arithmetic of every method, at one layer, where edits are numbers to add: w · a and a + b, or a typed error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.laws.cells import SMALL, registered, shaken
from trimtab.adapt.parse import method_from
from trimtab.errors import TrimtabError, UnsupportedError

X = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def adapters(kind: str) -> list[tt.Adapter]:
    """Two of this method on a layer of its kind, with different values."""
    method = method_from(SMALL.get(kind, kind))
    if method.needs_prompt or "inner" in dict(method) or len(method.members) > 1:
        pytest.skip("it acts on a model, not on a layer")
    method = method.replace(targets=("0",))
    found = []
    for seed in (1, 2):
        model = bare()
        try:
            shaken(tt.attach(model, method, f"a{seed}"), seed=seed)
        except TrimtabError as error:
            pytest.skip(str(error))
        found.append(tt.detach(model, f"a{seed}"))
        assert float(edit(found[-1]).abs().max()) > 1e-3
    return found


def bare() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8)).double().eval()


@torch.no_grad()
def edit(adapter: tt.Adapter) -> Tensor:
    """What it adds to the layer's output."""
    model = bare()
    base = model(X)
    tt.attach(model, adapter)
    return model(X) - base


@pytest.mark.parametrize("kind", registered())
def test_scaled_is_that_much_of_the_edit(kind: str) -> None:
    adapter = adapters(kind)[0]
    assert torch.equal(edit(tt.scaled(adapter, 1.0)), edit(adapter))
    try:
        half = tt.scaled(adapter, 0.5)
    except UnsupportedError as error:
        assert kind in str(error)
        return
    torch.testing.assert_close(edit(half), 0.5 * edit(adapter), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", registered())
def test_added_is_the_sum_of_the_edits(kind: str) -> None:
    a, b = adapters(kind)
    assert torch.equal(edit(tt.add([a], name="one")), edit(a))
    try:
        both = tt.add([a, b], name="both", weights=[1.0, 1.0])
    except UnsupportedError as error:
        assert kind in str(error)
        return
    torch.testing.assert_close(edit(both), edit(a) + edit(b), atol=1e-6, rtol=1e-6)
