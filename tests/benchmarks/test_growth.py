"""How a step grows, tiny: the formulas are those of the model that is measured, and a quick run writes its report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import __main__ as command
from benchmarks import growth
from benchmarks.alive import Alive
from benchmarks.growth_theory import Rates, Sizes, model_bytes, operations, seconds, step_bytes
from benchmarks.lines import slope

SMALL = Sizes(layers=2, width=64, rank=4, vocabulary=128, tokens=32, rows=2)


IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


class Counted(TorchDispatchMode):
    """Operations of products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        count = flop_registry.get(IN_PLACE.get(packet, packet))
        self.flops += 0 if count is None else int(count(*args, **(kwargs or {}), out_val=out))
        return out


def test_sizes_are_those_of_the_model() -> None:
    model = growth.Trained(SMALL).engine.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (trained, base) == (SMALL.trained, SMALL.weights)
    assert model_bytes(SMALL) == 4 * trained + 2 * base


def test_operations_are_those_of_a_step() -> None:
    made = growth.Trained(SMALL)
    made.step(0)
    with Counted() as counter:
        made.step(1)
    theory = operations(SMALL)
    # Attention computes scores once more in bf16, and its blocks look at a little more than half of the square.
    plain = sum(theory.values()) - theory["attention"]
    assert plain < counter.flops < plain + 3 * theory["attention"]


def test_tensors_of_a_step_are_those_of_the_formula() -> None:
    wide = replace(SMALL, width=128, layers=4, tokens=64)
    side = growth.Weighed()
    side.build(asdict(wide))
    side.step(0)
    assert side.alive(1) == pytest.approx(step_bytes(wide), rel=0.15)


def test_theory_has_the_exponents_of_its_terms() -> None:
    def grown(factor: str, value: int) -> float:
        found = [(times, replace(Sizes(), **{factor: value * times})) for times in (1, 2)]
        return slope([(times, growth.work(sizes)) for times, sizes in found])

    assert grown("layers", 1 << 10) == pytest.approx(1, abs=0.01)
    assert grown("width", 1 << 16) == pytest.approx(2, abs=0.01)
    assert grown("rank", 1 << 20) == pytest.approx(1, abs=0.01)
    assert grown("vocabulary", 1 << 22) == pytest.approx(1, abs=0.01)
    assert grown("tokens", 1 << 20) == pytest.approx(2, abs=0.01)
    assert seconds(Sizes(), Rates(1e12, 1e30, 0.0)) == pytest.approx(growth.work(Sizes()) / 1e12)


def test_only_what_lives_is_counted() -> None:
    kept = torch.zeros(1000)
    with Alive([kept]) as counted:
        kept.add_(1)
        for _ in range(3):
            made = kept * 2
            del made
        made = kept.view(10, 100) + 1
        del made
    assert counted.most == 4000


def test_slopes_are_marked_where_they_lie_apart() -> None:
    near = growth.compared([1, 2, 4], [1.0, 2.1, 4.0], [3.0, 6.0, 12.0])
    assert near["near"] and near["expected"] == pytest.approx(1)
    assert not growth.compared([1, 2, 4], [1.0, 1.5, 2.25], [3.0, 6.0, 12.0])["near"]


@pytest.mark.usefixtures("forked")
def test_a_quick_run_writes_a_report(tmp_path: Path) -> None:
    options = ["--quick", "--threads", "1", "--only", "tokens", "--out", str(tmp_path)]
    assert command.main(["growth", *options]) == 0
    found = json.loads((tmp_path / "growth.json").read_text("utf-8"))
    (row,) = found["factors"]
    assert row["values"] == [16, 32] and len(row["times"]["rounds"][0]) == 2
    assert set(row["quantities"]) == {"seconds", "tensors", "step", "model"}
    assert row["quantities"]["tensors"]["measured"][0] > 0
    assert "| tokens | tensors of a step |" in (tmp_path / "growth.md").read_text("utf-8")
    ElementTree.fromstring((tmp_path / "growth-tokens.svg").read_text("utf-8"))
