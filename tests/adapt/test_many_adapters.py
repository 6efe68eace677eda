"""What attaching costs: one pass over the model, however many sites and adapters there are; and none of it on meta."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import SMALL, registered
from trimtab.adapt import tree
from trimtab.adapt.tree import sites_of
from trimtab.errors import AttachError


def lines_run(action: Callable[[], Any]) -> int:
    """How many lines of Trimtab, and of torch's walk over modules, an action runs: work, whatever the machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if "trimtab" not in name and frame.f_code.co_name != "named_modules":
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def llama(blocks: int = 3) -> nn.Module:
    return tiny.llama(num_hidden_layers=blocks)


def test_the_work_of_attaching_grows_with_the_model_and_no_faster() -> None:
    """Twice the blocks are twice the sites and twice the modules: work in proportion, not its square."""
    tt.attach(llama(), "lora(rank=2)")  # what is done once per process
    work = {}
    for blocks in (8, 32):
        model = llama(blocks)
        work[blocks] = lines_run(lambda model=model: tt.attach(model, "lora(rank=2)"))
    assert work[32] < 4.4 * work[8]


def test_the_work_of_one_more_adapter_is_the_same_however_many_there_are() -> None:
    model = llama()
    saved = tt.attach(model, "lora(rank=2, targets=['q_proj', 'v_proj'])", "saved").detached()
    work = [lines_run(lambda n=n: tt.attach(model, saved, f"a{n}")) for n in range(40)]
    assert work[-1] < 1.05 * work[2]
    removed = [lines_run(lambda n=n: tt.detach(model, f"a{n}")) for n in range(40)]
    assert removed[0] < 2.5 * removed[-1]  # a place's slots are looked through for empty ones


def test_walks_do_not_enter_what_adapters_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that an attachment visits are those of the bare model and its wrappers."""
    visited: list[int] = []
    own = tree.walk

    def counting(root: nn.Module) -> Any:
        for module in own(root):
            visited.append(id(module))
            yield module

    model = llama()
    bare = sum(1 for _ in model.modules())
    for number in range(5):
        tt.attach(model, "lora(rank=2, targets=['q_proj'])", f"a{number}")
    monkeypatch.setattr(tree, "walk", counting)
    tt.attach(model, "lora(rank=2, targets=['q_proj'])", "last")
    assert visited and max(Counter(visited).values()) == 1
    assert len(visited) == bare + len(sites_of(model))
    assert sum(1 for _ in model.modules()) > bare + 40


@pytest.mark.parametrize("method", registered())
def test_it_attaches_to_a_model_without_weights(method: str) -> None:
    """On the meta device an adapter has the tensors that it has anywhere, and draws nothing."""
    value = SMALL.get(method, method)
    with torch.device("meta"):
        bare = llama()
    there, here = tt.attach(bare, value), tt.attach(llama(), value)
    assert {k: tuple(t.shape) for k, t in there.tensors.items()} == {
        k: tuple(t.shape) for k, t in here.tensors.items()
    }
    assert all(t.is_meta for t in there.tensors.values()) and there.count == here.count
    assert all(p.is_meta for p in bare.parameters())
    tt.detach(bare, "default")
    assert sites_of(bare) == {}


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()
    adapter = tt.attach(model, "lora(rank=2)")
    with pytest.raises(AttachError, match="'default' lies on the meta device and has no values"):
        adapter.save(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
