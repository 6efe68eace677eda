"""Mixed precision under a budget of bits: which layers are kept in int8, and what is in memory meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.engine import kit
from trimtab.errors import ConfigError, TargetError, UnknownNameError
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.models.load import Base
from trimtab.models.mixed import BITS, Mixer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which some layers have outliers: few bits round these worst."""
    base, path = kit.base(), tmp_path_factory.mktemp("base")
    with torch.no_grad():
        for number, name in enumerate(("layers.0.mlp.up_proj", "layers.1.self_attn.o_proj")):
            weight = base.model.get_submodule(f"model.{name}").weight
            weight[:, ::16] *= 30 * (number + 1)
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def stored(base: Base) -> dict[str, LowBitLinear]:
    return {n: m for n, m in base.model.named_modules() if isinstance(m, LowBitLinear)}


def average(base: Base) -> float:
    layers = stored(base).values()
    sizes = [one.in_features * one.out_features for one in layers]
    return sum(one.bits * size for one, size in zip(layers, sizes, strict=True)) / sum(sizes)


def errors(folder: Path, storage: str) -> dict[str, float]:
    dense = tt.load(folder, dtype="float32")
    found = {}
    for name, module in dense.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.detach()
            back = FORMATS[storage](weight, None).dense(torch.float32)
            found[name] = float((back - weight).norm() / weight.norm())
    return found


def worst_that_fit(
    weights: dict[str, Tensor], found: dict[str, float], storage: str, budget: float
) -> set[str]:
    """From the worst down, each that the budget still has room for."""
    sizes = {
        kind: {n: FORMATS[kind](w, None).bits * w.numel() for n, w in weights.items()}
        for kind in (storage, "int8")
    }
    room = budget * sum(w.numel() for w in weights.values()) - sum(sizes[storage].values())
    kept = set()
    for name in sorted(found, key=lambda name: (-found[name], name)):
        extra = sizes["int8"][name] - sizes[storage][name]
        if extra <= room:
            room -= extra
            kept.add(name)
    return kept


@pytest.mark.parametrize("storage", BITS)
@pytest.mark.parametrize("budget", [5.5, 5.8, 7.0])
def test_the_worst_layers_are_kept_as_far_as_the_budget_goes(
    folder: Path, storage: Any, budget: float
) -> None:
    base = tt.load(folder, dtype="float32", storage=storage, average_bits=budget)
    assert base.storage in (storage, "int8")
    assert base.mixed is not None
    assert average(base) <= budget
    assert base.mixed.average_bits == pytest.approx(average(base))
    layers = stored(base)
    kept = {name for name, layer in layers.items() if layer.kind == "int8"}
    assert kept == set(base.mixed.kept)
    assert {layer.kind for layer in layers.values()} == {storage, "int8"}
    found = errors(folder, storage)
    assert list(base.mixed.kept.values()) == sorted(base.mixed.kept.values(), reverse=True)
    for name, error in base.mixed.kept.items():
        assert error == pytest.approx(found[name], rel=1e-4)
    weights = {name: layer.dense(torch.float32) for name, layer in layers.items()}
    assert kept == worst_that_fit(weights, found, storage, budget)
    left = max(error for name, error in found.items() if name not in kept)
    assert base.mixed.left == pytest.approx(left, rel=1e-4)
    assert f"{len(kept)} of 14 layers in int8" in str(base.mixed)


def test_weights_are_the_file_s_own_in_either_format(folder: Path) -> None:
    dense = tt.load(folder, dtype="float32")
    base = tt.load(folder, dtype="float32", storage="nf4", average_bits=6.0)
    for name, layer in stored(base).items():
        weight = dense.model.get_submodule(name).weight.detach()
        assert torch.equal(
            layer.dense(torch.float32), FORMATS[layer.kind](weight, None).dense(torch.float32)
        )


def test_what_is_kept_does_not_depend_on_the_order() -> None:
    torch.manual_seed(0)
    weights = {f"l{n}.weight": torch.randn(32, 32 * (1 + n % 3)) * 1.0 for n in range(12)}
    for number, weight in enumerate(weights.values()):
        weight[0, 0] *= 1 + 10 * (number * 7 % 12)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    chosen = []
    for seed in range(4):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
        placed: dict[str, LowBitLinear] = {}
        mixer = Mixer("nf4", 5.5, sizes, placed.__setitem__)
        for name in (list(weights)[place] for place in order):
            mixer.add(name, name.partition(".")[0], weights[name], None)
        report = mixer.done()
        assert {n for n, layer in placed.items() if layer.kind == "int8"} == set(report.kept)
        chosen.append(report)
    assert all(report == chosen[0] for report in chosen)
    assert chosen[0].kept


def mixture(seed: int) -> dict[str, Tensor]:
    """Weights of several sizes, each with an outlier of its own."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for number in range(20):
        wide = 64 * int(torch.randint(1, 9, (), generator=generator))
        weights[f"l{number}"] = torch.randn(32, wide, generator=generator)
        weights[f"l{number}"][::4, 0] = 20 * torch.rand((), generator=generator)
    return weights


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [4.4, 4.8, 5.5, 7.0])
def test_where_the_worst_has_no_room_the_next_is_kept(seed: int, budget: float) -> None:
    weights = mixture(seed)
    sizes = {f"{path}.weight": weight.numel() for path, weight in weights.items()}
    found = {
        path: float((FORMATS["nf4"](w, None).dense(torch.float32) - w).norm() / w.norm())
        for path, w in weights.items()
    }
    expected = worst_that_fit(weights, found, "nf4", budget)
    reports = []
    for turn in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(turn)).tolist()
        placed: dict[str, LowBitLinear] = {}
        mixer = Mixer("nf4", budget, sizes, placed.__setitem__)
        for path in (f"l{number}" for number in order):
            mixer.add(f"{path}.weight", path, weights[path], None)
        reports.append(mixer.done())
        assert {n for n, layer in placed.items() if layer.kind == "int8"} == expected
        assert set(reports[-1].kept) == expected
        spent = sum(layer.bits * layer.weights for layer in placed.values())
        assert reports[-1].average_bits == pytest.approx(spent / sum(sizes.values()))
        assert reports[-1].average_bits <= budget
    assert reports[0] == reports[1] == reports[2]


def test_a_worst_layer_that_is_larger_than_the_budget_blocks_no_other() -> None:
    torch.manual_seed(0)
    weights = {"large": torch.randn(64, 512), "small": torch.randn(64, 64)}
    weights["large"][::2, ::64] = 40
    sizes = {f"{path}.weight": weight.numel() for path, weight in weights.items()}
    placed: dict[str, LowBitLinear] = {}
    mixer = Mixer("nf4", 5.0, sizes, placed.__setitem__)
    for path, weight in weights.items():
        mixer.add(f"{path}.weight", path, weight, None)
    report = mixer.done()
    assert set(report.kept) == {"small"}
    assert report.left > report.kept["small"]


def test_memory_is_bounded_while_weights_come() -> None:
    """Never more than the base in its final form would take at most, and the four-bit twins of what is kept."""
    torch.manual_seed(0)
    sizes = {f"l{n}.weight": 64 * 64 for n in range(40)}
    placed: dict[str, LowBitLinear] = {}
    mixer = Mixer("nf4", 5.0, sizes, placed.__setitem__)
    total, most = sum(sizes.values()), 0.0
    for name in sizes:
        mixer.add(name, name, torch.randn(64, 64), None)
        held = [*placed.values(), *mixer.twins()]
        most = max(most, sum(8.0 * b.nbytes for one in held for b in one.buffers()))
    kept = len(mixer.done().kept)
    assert 5 <= kept <= 10
    assert most <= 5.0 * total + 1.1 * BITS["nf4"] * 64 * 64 * 13  # at most 13 twins at any time
    assert not mixer.twins()


def test_formats_of_one_s_own_choice(folder: Path) -> None:
    base = tt.load(
        folder,
        dtype="float32",
        storage="nf4",
        exempt=["down_proj=int8", "*.layers.0.*q_proj", "o_proj=fp8"],
    )
    kinds = {n: m.kind for n, m in stored(base).items()}
    for name, kind in kinds.items():
        leaf = name.rpartition(".")[2]
        assert kind == {"down_proj": "int8", "o_proj": "fp8"}.get(leaf, "nf4")
    assert "model.layers.0.self_attn.q_proj" not in kinds
    assert "model.layers.1.self_attn.q_proj" in kinds
    mixed = tt.load(folder, storage="nf4", exempt=["down_proj=int8"], average_bits=5.0)
    assert mixed.mixed is not None
    assert mixed.mixed.layers == 12  # the budget chooses among the others
    assert not any(name.endswith("down_proj") for name in mixed.mixed.kept)
    with pytest.raises(UnknownNameError, match="unknown storage 'int9'. Did you mean 'int"):
        tt.load(folder, storage="nf4", exempt=["down_proj=int9"])
    with pytest.raises(TargetError, match="'dwn_proj' matches no linear layer"):
        tt.load(folder, storage="nf4", exempt=["dwn_proj=int8"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"average_bits": 5.0}, "storage is None"),
        ({"storage": "int8", "average_bits": 8.0}, "storage is 'int8'"),
        ({"storage": "nf4", "average_bits": 4.0}, r"nf4 alone takes 4\.127 bits"),
        ({"storage": "nf4", "average_bits": 9.0}, "name a number between"),
        ({"storage": "nf4", "average_bits": float("nan")}, "name a number between"),
        ({"exempt": ["q_proj"]}, "name the storage too"),
    ],
)
def test_budgets_that_nothing_meets(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tt.load(folder, **options)


def test_a_budget_that_these_layers_exceed(folder: Path) -> None:
    """96 columns are two groups of 64, the last half empty."""
    with pytest.raises(ConfigError, match=r"in int4 alone takes 5\.067 bits"):
        tt.load(folder, storage="int4", average_bits=5.0)


def test_a_mixed_base_trains_merges_and_is_saved(folder: Path, tmp_path: Path) -> None:
    from trimtab.models.saved import save_base

    base = tt.load(folder, dtype="float32", storage="nf4", average_bits=6.0)
    ids = torch.arange(3, 30)[None]
    tt.attach(base.model, tt.LoRA(rank=2), "a")
    base.model(input_ids=ids, labels=ids).loss.backward()
    report = tt.merge_with_report(base.model, "a", storage="base")
    assert {layer.storage for layer in report.layers} == {"nf4", "int8"}
    save_base(report.model, tmp_path / "m")  # type: ignore[arg-type]
    base.tokenizer.save_pretrained(tmp_path / "m")
    again = tt.load(tmp_path / "m", dtype="float32")
    kinds = {n.removesuffix(".base_layer"): m.kind for n, m in stored(base).items()}
    assert {n: m.kind for n, m in stored(again).items()} == kinds
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, report.model(input_ids=ids).logits)
