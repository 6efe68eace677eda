"""What attaching costs: one pass over the model, however many sites and adapters there are; and none of it on meta."""

from __future__ import annotations

import copy
import sys
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
from trimtab.errors import AttachError, BaseMismatchError


def lines_run(action: Callable[[], Any]) -> int:
    """How many lines of Trimtab, and of torch's modules, an action runs: work, whatever the machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if "trimtab" not in name and name != nn.modules.module.__file__:
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
    assert work[-1] == work[2]
    removed = [lines_run(lambda n=n: tt.detach(model, f"a{n}")) for n in range(40)]
    assert removed[1] == removed[-1]  # the first is the first of the process


CROWDS = (3, 200), (2, 12)
"""Few and many adapters: of one kind; and of another, which costs more to attach."""
KINDS = {
    "lora": ("llama", "lora(rank=2, targets=['q_proj', 'v_proj'])", CROWDS[0]),
    "sub-layers": ("llama", "bottleneck(size=2)", CROWDS[1]),
    "attention": ("llama", "prefix(length=3)", CROWDS[1]),
    "before the text": ("llama", "prompt(length=3)", CROWDS[1]),
    "experts": ("mixtral", "lora(rank=2, targets=['gate_up_proj'])", CROWDS[1]),
    "a whole module": ("bert", "lora(rank=2, targets=['query'], train=['bert.pooler'])", CROWDS[1]),
    "gates": ("llama", "spottune(inner=lora(rank=2), hidden=4)", CROWDS[1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_work_grows_with_the_adapters_that_are_attached(kind: str) -> None:
    """Neither that of a forward, nor of train(), nor of attaching and detaching one more."""
    name, method, crowds = KINDS[kind]
    case = tiny.CASES[name]
    work = [_work(case, method, crowd) for crowd in crowds]
    assert work[0] == work[1]


def _work(case: tiny.Case, method: str, crowd: int) -> dict[str, int]:
    model, inputs = case.make(), case.inputs()
    if case.decodes:
        inputs = {**inputs, "labels": inputs["input_ids"]}
    saved = tt.attach(model, method, "saved").detached()
    for number in range(crowd):
        tt.attach(model, saved, f"a{number}")

    def answer() -> None:
        with torch.no_grad(), tt.rows(model, ["a0", "a1", None, "a0"]):
            model(**inputs)

    def learn() -> None:
        with tt.using(model, "a1"):
            model(**inputs)

    def cached() -> None:
        with torch.no_grad(), tt.using(model, "a0"):
            model.generate(**tiny.pick(case.inputs(), [0]), max_new_tokens=2, do_sample=False)

    actions: dict[str, Callable[[], Any]] = {
        "train": lambda: model.train(),
        "learn": learn,
        "eval": lambda: model.eval(),
        "answer": answer,
        "attach": lambda: tt.attach(model, saved, "last"),
        "detach": lambda: tt.detach(model, "last"),
    }
    if case.decodes:
        actions["generate"] = cached
    for action in actions.values():
        action()  # what is done once per model, or per process
    return {name: lines_run(action) for name, action in actions.items()}


def test_what_hangs_below_a_place_is_in_the_mode_of_the_model() -> None:
    model = llama()
    tt.attach(model, "lora(rank=2)", "a")
    tt.attach(model, "prefix(length=2)", "b")
    for mode in (True, False):
        model.train(mode)
        tt.attach(model, "lora(rank=2)", "late")
        assert {module.training for module in model.modules()} == {mode}
        tt.detach(model, "late")
    model.train()
    assert {module.training for module in copy.deepcopy(model).modules()} == {True}


def test_what_is_known_of_a_base_is_found_out_once() -> None:
    model = llama()
    tt.attach(model, "lora(rank=2)", "a")
    first = tt.attach(model, "lora(rank=2)", "b")
    anatomy = tree.anatomy_of(model)
    again = tt.attach(model, "lora(rank=2)", "c")
    assert tree.anatomy_of(model) is anatomy and again.base is first.base


@pytest.mark.parametrize("change", ["written", "replaced", "layer"])
def test_another_base_is_noticed_while_adapters_are_attached(change: str) -> None:
    """What is kept of a base holds for its weights as they were: others are another base."""
    model = llama()
    tt.attach(model, "lora(rank=2, targets=['q_proj'])", "a")
    before = tt.attach(model, "lora(rank=2, targets=['q_proj'])", "b").detached()
    norm = model.model.norm
    with torch.no_grad():
        if change == "written":
            norm.weight.mul_(2)
        elif change == "replaced":
            norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
        else:
            model.model.norm = copy.deepcopy(norm)
            model.model.norm.weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="the weights differ"):
        tt.attach(model, before, "c")
    assert tree.anatomy_of(model).modules["model.norm"] is model.model.norm


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
    assert len(set(visited)) == bare + len(sites_of(model))
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
