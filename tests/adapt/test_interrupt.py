"""Ctrl-C in the middle of a forward: the next one obeys its own route."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

import trimtab as tt
from tests import tiny


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("scope", ["using", "plain"])
def test_after_an_interrupt_routes_are_as_they_were(scope: str) -> None:
    model = tiny.CASES["llama"].make().eval()
    inputs = tiny.CASES["llama"].inputs()
    for name in ("a", "b"):
        adapter = tt.attach(model, tt.LoRA(rank=2), name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.05 if name == "a" else -0.03)

    def acting(name: str | None) -> AbstractContextManager[None]:
        return tt.using(model, name)

    with torch.no_grad():
        expected = {}
        for name in ("a", "b", None):
            with acting(name):
                expected[name] = model(**inputs).logits
        both = model(**inputs).logits
        last: nn.Module = model.model.layers[-1]
        hook = last.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), acting("a") if scope == "using" else nullcontext():
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**inputs).logits, both)
        for name, logits in expected.items():
            with acting(name):
                assert torch.equal(model(**inputs).logits, logits), name
        with tt.rows(model, ["a", "b", None, "a"]):
            mixed = model(**inputs).logits
        assert torch.allclose(mixed[1], expected["b"][1], atol=1e-5)
        assert torch.allclose(mixed[2], expected[None][2], atol=1e-5)


def test_rows_of_an_interrupted_batch_are_forgotten() -> None:
    """The next batch has another number of rows; an old context would refuse or misread it."""
    model = tiny.CASES["llama"].make().eval()
    inputs = tiny.CASES["llama"].inputs()
    tt.attach(model, tt.method("spottune(inner=lora(rank=2), hidden=4)"), "gated")
    with torch.no_grad():
        few = tiny.pick(inputs, [0, 1])
        expected = model(**few).logits
        hook = model.model.layers[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        assert torch.equal(model(**few).logits, expected)
