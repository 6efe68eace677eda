"""A fusion made from trained adapters, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.tiny import CASES, output
from trimtab.errors import BaseMismatchError, ConfigError, TargetError, UnsupportedError


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_fusion_holds_its_parts_fixed_and_stands_alone(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, inputs = case.model(torch.float32), case.inputs()
    a = shaken(tt.attach(model, "pfeiffer(size=4)", "a"), seed=1)
    b = shaken(tt.attach(model, "pfeiffer(size=6)", "b"), seed=2)
    both = tt.fused(model, [a, b], "both")
    assert both.count == sum(t.numel() for n, t in both.named().items() if "fusion_" in n.slot)
    for number, part in enumerate((a, b)):
        for tensor_name, tensor in part.named().items():
            held = both.at_site(tensor_name.path)[f"part{number}_{tensor_name.slot}"]
            assert torch.equal(held, tensor) and not held.requires_grad
    with tt.using(model, "both"):
        expected = output(model, inputs)
    both.save(tmp_path / "both")
    fresh = case.model(torch.float32)
    loaded = tt.attach(fresh, tt.Adapter.load(tmp_path / "both"))
    assert torch.equal(output(fresh, inputs), expected)
    assert loaded.method == both.method and [p.size for p in loaded.method.parts] == [4, 6]


@pytest.mark.parametrize("kind", ["bottleneck(size=4)", "compacter(size=8)", "adapterplus(size=4)"])
def test_a_fusion_of_one_adapter_twice_is_that_adapter(kind: str) -> None:
    """p sums to one and V starts as the identity, so two equal parts make the part."""
    case = CASES["bert"]
    model, inputs = case.model(), case.inputs()
    a = shaken(tt.attach(model, kind, "a"))
    with tt.using(model, "a"):
        alone = output(model, inputs)
    both = tt.fused(model, [a, a.detached(name="b")], "both")
    with torch.no_grad():
        for key, tensor in both.tensors.items():
            if key.endswith("fusion_value.weight"):
                tensor.copy_(torch.eye(tensor.shape[0]))
    with tt.using(model, "both"):
        assert (output(model, inputs) - alone).abs().max() < 1e-9


def test_what_does_not_fuse_is_refused_and_nothing_stays() -> None:
    model = tiny.bert()
    a = tt.attach(model, "pfeiffer(size=4)", "a")
    other = tt.attach(tiny.llama(), "pfeiffer(size=4)", "other")
    houlsby = tt.attach(model, "bottleneck(size=4)", "houlsby")
    normed = tt.attach(model, "bottleneck(size=4, train=['norms'])", "normed")
    lora = tt.attach(model, "lora(rank=2)", "lora")
    with pytest.raises(BaseMismatchError):
        tt.fused(model, [a, other], "x")
    with pytest.raises(TargetError, match="must be the same"):
        tt.fused(model, [a, houlsby], "x")
    with pytest.raises(ConfigError, match="at least two"):
        tt.fused(model, [a], "x")
    with pytest.raises(ConfigError, match="add to hidden states"):
        tt.fused(model, [a, lora], "x")
    with pytest.raises(UnsupportedError, match="LayerNorm"):
        tt.fused(model, [houlsby, normed], "x")
    with pytest.raises(Exception, match="'x'"):
        tt.detach(model, "x")


def test_heads_of_the_parts_stay_behind_and_a_new_one_is_trained() -> None:
    model = tiny.bert()
    parts = [tt.attach(model, "pfeiffer(size=4, train=['classifier'])", name) for name in "ab"]
    both = tt.fused(model, parts, "both", train=["classifier"])
    trained = {name.slot for name in both.named() if name.path == "classifier"}
    assert trained == {"modules_to_save.weight", "modules_to_save.bias"}
