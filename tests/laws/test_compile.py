"""Compiled ≡ eager, for every method, on one block; without a break in the graph unless a hard gate skips rows."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from tests.laws.cells import Cell, attached, registered
from tests.tiny import CASES, llama, output
from trimtab.frozen.formats import FORMATS

BREAKS = {"spottune"}
"""A hard gate looks at its values to skip rows: the graph breaks there, and the result is the same."""


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("method", registered())
def test_compiled_is_eager(method: str) -> None:
    torch._dynamo.reset()
    model, inputs = llama(num_hidden_layers=1), CASES["llama"].inputs()
    attached(Cell(method, "llama"), model, "a")
    attached(Cell(method, "llama"), model, "b", seed=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=method not in BREAKS)
    with torch.no_grad():
        for name in ("a", "b", None):
            with tt.using(model, name):
                expected = output(model, {**inputs, "use_cache": False})
                assert torch.allclose(
                    output(compiled, {**inputs, "use_cache": False}), expected, atol=1e-5
                ), name
        with tt.rows(model, ["a", None, "b", "a"]):
            expected = output(model, {**inputs, "use_cache": False})
            assert torch.allclose(
                output(compiled, {**inputs, "use_cache": False}), expected, atol=1e-5
            )


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize(
    "method",
    ["lora", "bottleneck", "ia3", "shira", "prefix", "prompt", "llama-adapter", "kasa", "velora"],
)
def test_compiled_gradients_are_eager_gradients(method: str) -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        model = llama(num_hidden_layers=1)
        inputs = {**CASES["llama"].inputs(), "use_cache": False}
        adapter = attached(Cell(method, "llama"), model)
        model.train()  # nothing is dropped
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        output(run, inputs).tanh().sum().backward()
        found.append({n.key: t.grad for n, t in adapter.named().items() if n not in adapter.fixed})
    for key, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][key], atol=1e-4), key


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("storage", FORMATS)
def test_a_layer_in_few_bits_is_compiled_whole(storage: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = FORMATS[storage](torch.randn(64, 128), torch.randn(64))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for run in (layer, compiled):
        x = torch.ones(3, 128, requires_grad=True)
        y = run(x)
        y.tanh().sum().backward()
        found.append((y.detach(), x.grad))
    for eager, other in zip(*found, strict=True):
        assert torch.allclose(eager, other, atol=1e-5)
