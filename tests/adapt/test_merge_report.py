"""Merging into other dtypes and into few bits: what is stored, what it costs, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import trimtab as tt
from tests.engine import kit
from tests.laws.cells import shaken
from tests.tiny import CASES, output
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.probe import bare_state
from trimtab.errors import ConfigError, MergeError, ModelError, UnknownNameError, UnsupportedError
from trimtab.frozen.affine import AffineLinear
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.grouped import GroupedLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.frozen.lowbit_experts import LowBitExperts
from trimtab.kernels.grouped import Grouped, packed
from trimtab.models.load import Base
from trimtab.models.saved import save_base

BATCH = {"input_ids": torch.arange(3, 43).view(2, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, path = kit.base(), tmp_path_factory.mktemp("base")
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def adapted(folder: Path, storage: Any, method: str = "lora(rank=4)", std: float = 0.05) -> Base:
    base = tt.load(folder, dtype="float32", storage=storage)
    shaken(tt.attach(base.model, method, "a"), std)
    return base


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**BATCH).logits
    return out


def kinds(model: nn.Module) -> set[str]:
    return {m.kind for m in model.modules() if isinstance(m, LowBitLinear)}


@pytest.mark.parametrize("storage", FORMATS)
def test_a_base_in_few_bits_merges_into_a_dense_model(folder: Path, storage: str) -> None:
    """Also the layers that no adapter edits are dense then, and what they compute stays."""
    base = adapted(folder, storage, "lora(rank=4, targets='q_proj')")
    expected = logits(base.model)
    merged: Any = tt.merge(base.model, "a")
    assert not kinds(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    report = tt.merge_with_report(base.model, "a", batch=BATCH)
    assert report.gap is not None
    assert report.gap.share < 1e-4
    assert report.worst is not None
    assert report.worst.error < 1e-6
    assert torch.equal(logits(report.model), logits(merged))


def test_the_dtype_asked_for_is_that_of_everything_and_its_rounding_is_told(folder: Path) -> None:
    base = adapted(folder, "nf4")
    report = tt.merge_with_report(base.model, "a", dtype=torch.bfloat16, batch=BATCH)
    assert {p.dtype for p in report.model.parameters()} == {torch.bfloat16}
    for layer in report.layers:
        assert layer.storage == "bfloat16"
        assert 1e-4 < layer.error < 2**-8
        assert layer.lost is not None
        assert layer.lost > layer.error


@pytest.mark.parametrize("storage", FORMATS)
def test_it_is_rounded_again_into_the_base_s_format_and_loads_again(
    folder: Path, storage: str, tmp_path: Path
) -> None:
    base = adapted(folder, storage)
    before = {n: t.clone() for n, t in bare_state(base.model).items()}
    report = tt.merge_with_report(base.model, "a", storage="base", batch=BATCH)
    after = bare_state(base.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert kinds(report.model) == {storage}
    exact: Any = tt.merge(base.model, "a")
    for layer in report.layers:
        module = report.model.get_submodule(layer.path)
        assert isinstance(module, LowBitLinear)
        want = exact.get_submodule(layer.path).weight.detach()
        off = (module.dense(torch.float32) - want).norm() / want.norm()
        assert layer.error == pytest.approx(float(off), rel=1e-3, abs=1e-7)
        assert layer.error < 0.15
    assert report.worst is not None
    assert report.worst.error == max(layer.error for layer in report.layers)
    assert report.gap is not None
    gap = (logits(report.model) - logits(base.model)).norm() / logits(base.model).norm()
    assert report.gap.gap == pytest.approx(float(gap), rel=1e-3)
    save_base(report.model, tmp_path / "merged")  # type: ignore[arg-type]
    base.tokenizer.save_pretrained(tmp_path / "merged")
    loaded = tt.load(tmp_path / "merged", dtype="float32")
    assert loaded.storage == storage
    assert torch.equal(logits(loaded.model), logits(report.model))
    tt.attach(loaded.model, tt.LoRA(rank=2), "more")
    tt.merge_with_report(loaded.model, "more", storage="base")


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_what_was_read_in_few_bits_and_merged_densely_is_saved_as_any_model(
    folder: Path, storage: str, tmp_path: Path
) -> None:
    report = tt.merge_with_report(adapted(folder, storage).model, "a", storage="base")
    save_base(report.model, tmp_path / "low")  # type: ignore[arg-type]
    kit.base().tokenizer.save_pretrained(tmp_path / "low")
    again = tt.load(tmp_path / "low", dtype="float32")
    shaken(tt.attach(again.model, "lora(rank=2)", "b"), 0.05)
    merged: Any = tt.merge(again.model, "b")
    save_base(merged, tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="float32")
    torch.testing.assert_close(logits(plain), logits(again.model), atol=1e-4, rtol=1e-4)


def test_other_formats_than_the_base_s(folder: Path, tmp_path: Path) -> None:
    dense, packed = adapted(folder, None), adapted(folder, "nf4")
    for base in (dense, packed):
        report = tt.merge_with_report(base.model, "a", storage="int8", batch=BATCH)
        linear = [n for n in dict(packed.model.named_modules()) if n.endswith("_proj")]
        assert {layer.path for layer in report.layers} == set(linear)
        assert kinds(report.model) == {"int8"}
    assert type(report.model.get_submodule("lm_head")) is nn.Linear
    assert tt.merge_with_report(dense.model, "a", storage="base").worst.storage == "float32"  # type: ignore[union-attr]


def test_an_edit_that_rounding_would_undo_is_refused_unless_forced(folder: Path) -> None:
    """The weights are hardly off (the adapter is small); but of what the adapter does, most is lost."""
    base = adapted(folder, "nf4", std=0.004)
    for batch, what in ((BATCH, "outputs"), (None, "weights")):
        with pytest.raises(
            MergeError, match=rf"undoes \d+% of what the adapter does to the {what}"
        ):
            tt.merge_with_report(base.model, "a", storage="base", batch=batch)
    forced = tt.merge_with_report(base.model, "a", storage="base", batch=BATCH, force=True)
    assert forced.lost > 0.5
    tt.merge_with_report(base.model, "a", storage="base", batch=BATCH, tolerance=1e9)
    assert any("of what the adapter does" in line for line in forced.lines())


def test_nothing_is_lost_of_an_adapter_that_does_nothing(folder: Path) -> None:
    base = tt.load(folder, dtype="float32", storage="int8")
    tt.attach(base.model, tt.LoRA(rank=4), "new")
    report = tt.merge_with_report(base.model, "new", storage="base", batch=BATCH)
    assert torch.equal(logits(report.model), logits(base.model))


def test_unknown_storage_and_models_without_known_targets(folder: Path) -> None:
    base = adapted(folder, None)
    with pytest.raises(UnknownNameError, match="unknown storage 'nf5'. Did you mean 'nf4'"):
        tt.merge_with_report(base.model, "a", storage="nf5")
    model = nn.Sequential(nn.Linear(64, 64))
    shaken(tt.attach(model, tt.LoRA(rank=2, targets="0"), "a"))
    with pytest.raises(ConfigError, match="models of transformers alone"):
        tt.merge_with_report(model, "a", storage="nf4")
    tt.merge_with_report(model, "a", dtype=torch.float64, batch=torch.randn(3, 64))


@pytest.mark.parametrize("storage", ["nf4", "fp4"])
def test_transformers_reads_such_a_folder_with_bitsandbytes(storage: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    base = kit.base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    ours = tt.load(tmp_path / "base", dtype="float32", storage=storage, exempt=["k_proj"])
    shaken(tt.attach(ours.model, "lora(rank=2)", "a"), 0.05)
    report = tt.merge_with_report(ours.model, "a", storage="base")
    save_base(report.model, tmp_path / "merged")  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for layer in report.layers:
        module, mine = (m.get_submodule(layer.path) for m in (theirs, report.model))
        if layer.path.endswith("k_proj"):
            assert torch.equal(module.weight, mine.weight)
        elif mine.in_features % 64 == 0:  # where its CPU kernel is right
            dense = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(dense.float(), mine.dense(torch.float32))


# -- exact merges into groups ------------------------------------------------------------------------


def grouped(folder: Path, storage: str, group: int) -> tuple[Base, Adapter]:
    """A LoRA whose A is constant over each group of input columns: it sees the groups' means, as QA-LoRA's does."""
    base = tt.load(folder, dtype="float32", storage=storage)
    adapter = shaken(tt.attach(base.model, tt.LoRA(rank=4), "a"), 0.05)
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            if "lora_A" in name:
                for part in tensor.split(group, dim=1):
                    part.copy_(part.mean(1, keepdim=True).expand_as(part))
    return base, adapter


@pytest.mark.parametrize("storage", ["int4", "int8-group"])
def test_a_change_that_is_constant_by_group_is_merged_exactly(
    folder: Path, storage: str, tmp_path: Path
) -> None:
    """down_proj has 96 columns: a group of 64 and a short one of 32."""
    base, _ = grouped(folder, storage, 64)
    expected = logits(base.model)
    report = tt.merge_with_report(base.model, "a", storage="base", batch=BATCH, tolerance=1e-4)
    assert all(layer.exact for layer in report.layers)
    assert "exactly" in report.lines()[0]
    torch.testing.assert_close(logits(report.model), expected, atol=1e-4, rtol=1e-4)
    for layer in report.layers:
        old, new = (m.get_submodule(layer.path) for m in (base.model, report.model))
        frozen: Any = old.base_layer
        assert isinstance(new, AffineLinear)
        assert torch.equal(new.codes, frozen.codes)
        assert torch.equal(new.scales, frozen.scales)
        assert not torch.equal(new.offsets, frozen.offsets)
    save_base(report.model, tmp_path / "m")  # type: ignore[arg-type]
    base.tokenizer.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(tt.load(tmp_path / "m", dtype="float32").model), logits(report.model))


def test_other_groups_than_the_format_s_are_not_exact(folder: Path) -> None:
    base, _ = grouped(folder, "int4", 32)
    report = tt.merge_with_report(base.model, "a", storage="base", force=True)
    assert not any(layer.exact for layer in report.layers)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_arrive_with_whole_zeros_take_such_a_change_too(bits: int) -> None:
    """What GPTQ and AWQ store: zeros are whole numbers there, and offsets after it. The codes are the same."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (8, 64), generator=generator, dtype=torch.uint8)
    scales, zeros = torch.rand(8, 4, generator=generator) / 2**bits, torch.full((8, 4), 7.0)
    layer = GroupedLinear(
        "gptq", Grouped(packed(codes, bits), bits, scales, zeros), None, torch.float32
    )
    change = torch.randn(8, 4, generator=generator).repeat_interleave(16, 1)
    new = layer.shifted(change, None)
    assert isinstance(new, AffineLinear)
    torch.testing.assert_close(new.dense(torch.float32), layer.dense(torch.float32) + change)
    assert layer.shifted(torch.randn(8, 64), None) is None
    same = layer.shifted(torch.zeros(8, 64), None)
    assert same is not None
    torch.testing.assert_close(same.dense(torch.float32), layer.dense(torch.float32))
    with pytest.raises(UnsupportedError, match="reads weights in gptq"):
        layer.like(change, None)


def test_a_grouped_layer_computes_what_its_numbers_say() -> None:
    weight = torch.randn(6, 150, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.25  # a constant row has a scale of zero
    layer = AffineLinear.of(weight, None, 4, group=64)
    back = layer.dense(torch.float32)
    steps = layer.scales.float().repeat_interleave(64, 1)[:, :150]
    assert bool(((back - weight).abs() <= steps * 0.54).all())
    assert torch.equal(back[2], weight[2])
    assert layer.bits == pytest.approx((3 * 32 + 3 * 6) * 8 / 150)
    wide = torch.randn(64, 256)
    assert AffineLinear.of(wide, None, 4).bits == 4.75
    assert AffineLinear.of(wide, None, 8).bits == 9.0
    again = layer.like(back, None).dense(torch.float32)
    assert torch.allclose(again, back, atol=1e-5)
    for bits, group in ((3, 64), (4, 7), (4, 0)):
        with pytest.raises(ConfigError, match=r"4 or 8 bits|even number"):
            AffineLinear.of(wide, None, bits, group=group)


# -- experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["lora(rank=2, targets='**.experts.*_proj')", "lora(rank=2, targets='q_proj')"]
)
def test_experts_are_made_dense_or_rounded_again(method: str, tmp_path: Path) -> None:
    case = CASES["mixtral-nf4"]
    model, inputs = case.model(torch.float32), case.inputs()
    before = {n: t.clone() for n, t in bare_state(model).items()}
    shaken(tt.attach(model, method, "a"), 0.2)
    with torch.no_grad():
        expected = output(model, inputs)
        dense = tt.merge(model, "a")
        torch.testing.assert_close(output(dense, inputs), expected, atol=1e-4, rtol=1e-4)
        assert not any(isinstance(m, LowBitExperts | LowBitLinear) for m in dense.modules())
        report = tt.merge_with_report(model, "a", storage="base", batch=inputs, force=True)
    experts = [m for m in report.model.modules() if isinstance(m, LowBitExperts)]
    assert all(set(m.formats) == {"gate_up_proj", "down_proj"} for m in experts) and experts
    named = {layer.path.rpartition(".")[2] for layer in report.layers if layer.lost is not None}
    assert ("gate_up_proj" in named) == ("experts" in method)
    assert all(layer.error < 0.15 for layer in report.layers)
    assert same(before, bare_state(model))
    save_base(report.model, tmp_path)  # type: ignore[arg-type]
    kit.base().tokenizer.save_pretrained(tmp_path)
    again = tt.load(tmp_path, dtype="float32")
    assert same(report.model.state_dict(), again.model.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- a saved base in few bits that is not whole ------------------------------------------------------


def test_a_folder_that_lacks_state_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tt.load(folder, dtype="float32", storage="int4")
    save_base(base.model, tmp_path / "m")
    base.tokenizer.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "trimtab"
    whole = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight.int4"
    for change, says in (
        ({f"{key}.scales": None}, "lacks weight.int4.scales"),
        ({f"{key}.codes": whole[f"{key}.codes"][:-1]}, "not those of a weight of 96 × 64"),
    ):
        kept = {n: t for n, t in {**whole, **change}.items() if t is not None}
        save_file(kept, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=says):
            tt.load(tmp_path / "m")
