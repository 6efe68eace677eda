"""Blocks that keep little for backward compute what they compute else: every method, mixed rows, exactly."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import trimtab as tt
from tests.laws.cells import Cell, attached, law
from tests.laws.test_laws import close, gradients, with_prompt
from tests.tiny import CASES, output
from trimtab.adapt.lean import plainly


@law
def test_lean_gradients_are_plain_gradients(cell: Cell) -> None:
    case = CASES[cell.model]
    found = []
    for less in (False, True):
        model, inputs = case.model(), with_prompt(cell, case.inputs())
        a = attached(cell, model, "a")
        attached(cell, model, "b", seed=2)
        model.train()
        kinds = [type(module) for module in model.modules()]
        torch.manual_seed(3)
        with tt.rows(model, ["a", None, "a", "b"]), nullcontext() if less else plainly():
            loss = output(model, inputs).tanh().sum()
        loss.backward()
        assert kinds == [type(module) for module in model.modules()]
        found.append(gradients(a))
    for key, gradient in found[0].items():
        other = found[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            assert close(gradient, other), key


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "method", ["lora(rank=4)", "dora(rank=4)", "ia3", "pfeiffer(size=6)", "norms"]
)
def test_with_norms_too(family: str, method: str) -> None:
    """In fp32, where norms are ours as well (unless they are trained)."""
    found = []
    for less in (False, True):
        model, inputs = CASES[family].model(torch.float32), CASES[family].inputs()
        adapter = tt.attach(model, method, "a")
        model.train()
        with nullcontext() if less else plainly():
            loss = output(model, inputs).tanh().sum()
        loss.backward()
        found.append((loss.detach(), gradients(adapter)))
    (plain, want), (ours, got) = found
    assert torch.equal(plain, ours), "forwards are the same, bit for bit"
    for key, gradient in want.items():
        other = got[key]
        assert gradient is not None and other is not None
        assert (other - gradient).norm() <= 1e-5 * gradient.norm(), key
