"""What transformers records of a model with adapters is what the model goes on with."""

from __future__ import annotations

from typing import ClassVar, final

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.laws.test_laws import recompute_blocks
from trimtab.adapt.contract import At, Layer, Method, Params, Spec, ones

IDS = {"input_ids": torch.arange(3, 11)[None]}
ON_BLOCKS = ["adapterplus(size=6)", "pfeiffer(size=6)", "loreft(rank=3, first=2, last=1)"]


@pytest.mark.parametrize("text", ON_BLOCKS)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_recorded_hidden_states_are_those_after_the_edit(text: str, make) -> None:
    model = make()
    model(**IDS, output_hidden_states=True)  # its recording hooks exist before ours
    shaken(tt.attach(model, tt.method(text), "a"))
    out = model(**IDS, output_hidden_states=True)
    norm = model.get_submodule("model.norm" if make is tiny.llama else "transformer.ln_f")
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**IDS)
    handle.remove()
    assert torch.equal(norm(seen[0]), out.hidden_states[-1])
    with tt.using(model, None):
        bare = model(**IDS, output_hidden_states=True)
    for mine, theirs in zip(out.hidden_states[1:], bare.hidden_states[1:], strict=True):
        assert not torch.allclose(mine, theirs)


class Shift(nn.Module):
    """A block that is no layer Trimtab knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@final
class BothEnds(Method):
    """Edits what enters a sub-layer and what leaves it, which needs what was given."""

    kind: ClassVar[str] = "test-both-ends"

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        return {"v": Spec("both_v", (3,), ones)}

    def enter(self, p: Params, x: Tensor, at: At) -> Tensor:
        return x * p["v"]

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor:
        return x

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return y + 2 * at.x


@torch.no_grad()
def test_a_sub_layer_is_edited_at_both_ends_with_what_was_given() -> None:
    """delta and leave read what entered before this method's own edit of it."""
    model = nn.Sequential(Shift(), nn.Linear(3, 3))
    adapter = tt.attach(model, BothEnds(targets=("0",)), "a")
    for parameter in adapter.parameters():
        parameter.fill_(2.0)
    x = torch.randn(4, 3)
    expected = (2 * x).sin() + x + 2 * x
    torch.testing.assert_close(model[0](x), expected)
    with tt.rows(model, ["a", None, "a", None]):
        mixed = model[0](x)
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(mixed[[1, 3]], x[[1, 3]].sin())


@pytest.mark.parametrize("text", ["adapterplus(size=6)", "parallel(size=6)"])
def test_recomputed_blocks_are_edited_once(text: str) -> None:
    found = []
    for recompute in (False, True):
        model = tiny.llama()
        adapter = shaken(tt.attach(model, tt.method(text), "a"))
        if recompute:
            recompute_blocks(model)
        model.train()
        torch.manual_seed(0)
        model(**IDS).logits.tanh().sum().backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)
