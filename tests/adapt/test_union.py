"""Unions: how they are written, where their parts act, how they train, merge and are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from trimtab.adapt.arithmetic import add, scaled
from trimtab.adapt.export import exported
from trimtab.adapt.parse import method_from
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.errors import (
    ConfigError,
    FileFormatError,
    NotMergeableError,
    TargetError,
    TrimtabError,
)
from trimtab.optim.params import AdamParams

IDS = {"input_ids": torch.arange(3, 11)[None].repeat(2, 1)}
AFFINE = "lora(rank=4)|bitfit|ia3"


def attached(
    method: str | tt.Method, name: str = "a", seed: int = 1, model: nn.Module | None = None
) -> nn.Module:
    model = tiny.llama() if model is None else model
    shaken(tt.attach(model, method_from(method), name), seed=seed)
    return model


@pytest.mark.parametrize(
    "written",
    [
        "lora(rank=8)|prefix(length=30)",
        " lora ( rank = 8 ) | prefix(length=30) ",
        ["lora(rank=8)", {"kind": "prefix", "length": 30}],
        {"kind": "union", "parts": [{"kind": "lora", "rank": 8}, "prefix(length=30)"]},
        "union(parts=[lora(rank=8), 'prefix(length=30)'])",
        tt.LoRA(rank=8) | tt.Prefix(length=30),
        "lora(rank=8)" | tt.Prefix(length=30),
        tt.Union(parts=(tt.LoRA(rank=8), "prefix(length=30)")),
    ],
)  # fmt: skip
def test_every_way_to_write_a_union_is_the_same_value(written: object) -> None:
    value = method_from(written)  # type: ignore[arg-type]
    assert value == tt.Union(parts=(tt.LoRA(rank=8), tt.Prefix(length=30)))
    assert method_from(value.to_dict()) == value
    assert method_from(value.to_dict(given=True)) == value


def test_unions_are_flat_and_bars_inside_quotes_are_text() -> None:
    three = tt.method("lora(targets='re:.*(q|v)_proj')|bitfit") | tt.IA3()
    assert [part.kind for part in three.members] == ["lora", "bitfit", "ia3"]
    nested = method_from(
        ["bitfit", {"kind": "union", "parts": ["lora", "ia3"], "train": ["score"]}]
    )
    assert [part.kind for part in nested.members] == ["bitfit", "lora", "ia3"]
    assert nested.members[-1].train == ("score",)
    assert method_from(["lora(rank=3)"]) == tt.LoRA(rank=3)


@pytest.mark.parametrize(
    "text",
    ["lora|", "|lora", "lora||ia3", "lora|nope", "lora(rank=__import__('os').getpid())|ia3", "lora(rank=1+1)|ia3",
     "union(parts=[lora])", "union(parts=[lora, ia3], targets='x')", "lora|ia3)|bitfit", "lora|*"],
)  # fmt: skip
def test_what_is_no_union_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        tt.method(text)


def test_parts_act_as_the_same_methods_do_as_two_adapters() -> None:
    union = attached("lora(rank=4)|bottleneck(size=5)|prefix(length=3)")
    apart = tiny.llama()
    for text in ("lora(rank=4)", "bottleneck(size=5)", "prefix(length=3)"):
        tt.attach(apart, tt.method(text), text.partition("(")[0])
    given = union.trimtab.adapters["a"].tensors
    with torch.no_grad():
        for adapter in apart.trimtab.adapters.values():
            for key, tensor in adapter.tensors.items():
                tensor.copy_(given[key])
    assert torch.equal(tiny.output(union, IDS), tiny.output(apart, IDS))
    assert union.trimtab.adapters["a"].count == sum(
        a.count for a in apart.trimtab.adapters.values()
    )


def test_an_affine_union_merges_and_another_names_the_part_that_does_not() -> None:
    model = attached(AFFINE)
    expected = tiny.output(model, IDS)
    torch.testing.assert_close(tiny.output(tt.merge(model, "a"), IDS), expected)
    with pytest.raises(NotMergeableError, match="part bottleneck, it passes"):
        tt.merge(attached("lora|bottleneck(size=4)"), "a")


def test_a_plain_module_takes_a_union() -> None:
    inputs = tiny.CASES["mixed"].inputs()
    model = attached(
        "lora(rank=4, targets=['head', 'conv1'])|bitfit(targets='norm')", model=tiny.mixed()
    )
    expected = tiny.output(model, inputs)
    torch.testing.assert_close(tiny.output(tt.merge(model, "a"), inputs), expected)


def test_two_parts_share_a_layer_but_not_a_slot() -> None:
    attached(
        "lora(rank=2, targets='q_proj')|lora(rank=4, targets='v_proj')|dora(rank=2, targets='k_proj')"
    )
    with pytest.raises(TargetError, match="two adapters"):
        attached("lora(rank=2)|lora(rank=4, targets='v_proj')")
    with pytest.raises(TargetError, match="adapted and trained in full"):
        attached("lora|full(targets='lm_head')|bitfit(targets='lm_head')")


def test_saving_loading_and_a_head(tmp_path: Path) -> None:
    inputs = tiny.CASES["classifier"].inputs()
    method = tt.method(
        "lora(rank=4, train=['score'])|prefix(length=3)|spottune(hidden=4, inner=bitfit)"
    )
    model = attached(method, model=tiny.llama_classifier())
    adapter = model.trimtab.adapters["a"]
    assert adapter.method == method and adapter.methods[-1].kind == "full"
    expected = tiny.output(model, inputs)
    adapter.save(tmp_path / "a")
    loaded = tt.Adapter.load(tmp_path / "a")
    assert loaded == adapter and loaded.method == method
    fresh = tiny.llama_classifier()
    tt.attach(fresh, loaded)
    assert torch.equal(tiny.output(fresh, inputs), expected)
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    assert '"TRIMTAB_UNION"' in config
    ours = tmp_path / "a" / "trimtab.json"
    text = ours.read_text()
    assert '"score",\n      "",\n      3' in text
    ours.write_text(text.replace('"score",\n      "",\n      3', '"score",\n      "",\n      4'))
    with pytest.raises(FileFormatError, match="method that is not there"):
        tt.Adapter.load(tmp_path / "a")


def test_peft_refuses_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    attached("lora|prefix(length=3)").trimtab.adapters["a"].save(tmp_path / "a")
    with pytest.raises((KeyError, ValueError, TypeError), match="TRIMTAB_UNION"):
        peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "a"))


def test_each_part_learns_at_its_own_rate() -> None:
    model = tiny.llama()
    adapter = tt.attach(model, tt.method("lora(rank=4)|prefix(length=3)|bitfit"), "a")
    assert adapter.method.default_lr == tt.LoRA.lr
    engine = Engine(model)
    before = {key: tensor.detach().clone() for key, tensor in adapter.tensors.items()}
    engine.forward_backward([Datum.causal([3, 4, 5, 6], [0, 1, 1, 1])], "a")
    engine.optim_step("a", AdamParams(lr=1e-3, eps=1e-30, clip=None))
    paces = {
        "bitfit_bias": tt.BitFit.lr / tt.LoRA.lr,
        "lora_B": 1.0,
        "prompt_encoder": tt.Prefix.lr / tt.LoRA.lr,
    }
    for key, tensor in adapter.tensors.items():
        pace = next((pace for slot, pace in paces.items() if slot in key), None)
        moved = (tensor - before[key]).abs().max()
        if pace is not None:  # Adam's first step is the rate itself
            torch.testing.assert_close(moved, torch.tensor(1e-3 * pace), rtol=2e-3, atol=1e-8)
    groups = tt.parameter_groups(adapter, lr=1.0)
    assert sorted({round(group["lr"], 6) for group in groups}) == [1.0, 5.0, 25.0]


def test_arithmetic_goes_part_by_part() -> None:
    model = attached(AFFINE)
    attached(AFFINE, "b", seed=2, model=model)
    a, b = (model.trimtab.adapters[name] for name in "ab")
    fresh = tiny.llama()
    tt.attach(fresh, scaled(a, 0.5, name="less"))
    assert fresh.trimtab.adapters["less"].method == a.method
    both = add([a, b], name="both")
    assert [part.kind for part in both.method.members] == ["lora", "bitfit", "ia3"]
    assert both.method.members[0].rank == 8  # type: ignore[attr-defined]
    tt.attach(model, both)
    with tt.using(model, "both"):
        found = tiny.output(model, IDS)
    alone = tiny.llama()
    tt.attach(alone, add([b, a], name="other"))
    torch.testing.assert_close(tiny.output(alone, IDS), found)
    with pytest.raises(ConfigError, match=r"lora \| bitfit \| ia3"):
        add([a, tt.attach(tiny.llama(), tt.method("lora|bitfit"), "c")], name="no")


def test_the_exported_form_exports_each_part() -> None:
    model = attached("lora(rank=4)|prefix(length=3)")
    form = exported(model.trimtab.adapters["a"], name="b")
    fresh = tiny.llama()
    tt.attach(fresh, form)
    assert torch.equal(tiny.output(fresh, IDS), tiny.output(model, IDS))


def test_a_stack_of_adapters_of_different_kinds_is_their_union() -> None:
    model = attached("lora(rank=4)", "first")
    attached("bottleneck(size=5)", "second", seed=2, model=model)
    attached("prefix(length=3)|ia3", "third", seed=3, model=model)
    stacked = tiny.output(model, IDS)
    union = tiny.llama()
    whole = tt.attach(union, tt.method("lora(rank=4)|bottleneck(size=5)|prefix(length=3)|ia3"), "u")
    with torch.no_grad():
        for adapter in model.trimtab.adapters.values():
            for key, tensor in adapter.tensors.items():
                whole.tensors[key].copy_(tensor)
    assert torch.equal(tiny.output(union, IDS), stacked)
    with tt.rows(model, [("first", "third"), None]):
        mixed = tiny.output(model, IDS)
    with tt.using(model, ("first", "third")):
        torch.testing.assert_close(mixed[0], tiny.output(model, IDS)[0])
    with tt.using(model, None):
        torch.testing.assert_close(mixed[1], tiny.output(model, IDS)[1])


def test_a_failing_part_changes_nothing() -> None:
    model = tiny.llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(TrimtabError):
        tt.attach(model, tt.method("lora|bitfit(targets='nowhere')"), "a")
    assert [name for name, _ in model.named_modules()] == names


def test_describe_and_resolve_name_the_parts() -> None:
    model = attached("lora(rank=2)|prefix(length=3)")
    assert "a: lora + prefix" in tt.describe(model)
    assert "prefix" in tt.resolve(tiny.llama(), "lora|prefix(length=3)")
