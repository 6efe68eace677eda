"""Bases in few bits: rounded while they are loaded, read as bitsandbytes stored them, refused where that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import trimtab as tt
from tests.engine import kit
from tests.tiny import CASES
from trimtab.errors import ConfigError, ModelError, TargetError, UnknownNameError, UnsupportedError
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.fourbit import FourBit, quantise
from trimtab.models.quantise import targets
from trimtab.models.storage import STORAGES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = kit.base()
    base.model.save_pretrained(tmp_path / "dense")
    base.tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def logits(base: tt.Base) -> Tensor:
    with torch.no_grad():
        out: Tensor = base.model(input_ids=torch.arange(3, 11)[None]).logits
    return out


@pytest.mark.parametrize("storage", STORAGES)
def test_linear_layers_are_rounded_and_the_rest_is_not(folder: Path, storage: Any) -> None:
    dense = tt.load(folder, dtype="float32")
    base = tt.load(folder, dtype="float32", storage=storage)
    assert base.storage == storage
    layers = {n for n, m in base.model.named_modules() if isinstance(m, LowBitLinear)}
    linear = {n for n, m in dense.model.named_modules() if type(m) is torch.nn.Linear}
    assert layers == linear - {"lm_head"}
    for name, value in base.model.state_dict().items():
        if "layers" not in name or "norm" in name:
            assert torch.equal(value, dense.model.state_dict()[name])
    off = (logits(base) - logits(dense)).abs().max()
    assert 0 < off < 0.5 * logits(dense).abs().max()


def test_it_computes_what_its_dense_weights_compute(folder: Path) -> None:
    base = tt.load(folder, dtype="float32", storage="nf4")
    expected = logits(base)
    for name, module in list(base.model.named_modules()):
        if isinstance(module, LowBitLinear):
            parent, _, child = name.rpartition(".")
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight = torch.nn.Parameter(module.dense(torch.float32))
            base.model.get_submodule(parent).add_module(child, dense)
    assert torch.equal(logits(base), expected)


def test_exempt_layers_stay_dense(folder: Path) -> None:
    base = tt.load(folder, storage="int8", exempt=["down_proj", "*.layers.0.*"])
    kinds = {n: type(m).__name__ for n, m in base.model.named_modules() if n.endswith("_proj")}
    dense = {name for name, kind in kinds.items() if kind == "Linear"}
    assert dense == {n for n in kinds if n.endswith("down_proj") or ".layers.0." in n}
    with pytest.raises(TargetError, match="'dwn_proj' matches no linear layer.*'down_proj'"):
        tt.load(folder, storage="int8", exempt=["dwn_proj"])


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "classifier", "vit"])
def test_a_head_of_classes_stays_dense(name: str) -> None:
    """It is small, and an adapter may train it in full."""
    chosen = targets(CASES[name].make(), ())  # type: ignore[arg-type]
    assert chosen
    assert not [name for name in chosen if name.startswith(("classifier", "score"))]


def test_unknown_storage_is_named(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown storage 'nf5'. Did you mean 'nf4'"):
        tt.load(folder, storage="nf5")  # type: ignore[arg-type]


def test_it_trains_and_the_codes_stay(folder: Path) -> None:
    base = tt.load(folder, dtype="float32", storage="nf4")
    before = {name: b.clone() for name, b in base.model.named_buffers()}
    adapter = tt.attach(base.model, tt.LoRA(rank=4), "a")
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.5)
    ids = torch.arange(3, 11)[None]
    losses = []
    for _ in range(5):
        loss = base.model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    tt.detach(base.model, "a")
    after = dict(base.model.named_buffers())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_weight_in_few_bits_is_not_trained_itself(folder: Path) -> None:
    base = tt.load(folder, storage="fp8")
    with pytest.raises(UnsupportedError, match="cannot be trained itself"):
        tt.attach(base.model, tt.Full(targets="q_proj"), "a")


# -- what bitsandbytes stored ------------------------------------------------------------------------


def stored(
    folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None] | None = None
) -> Path:
    """A checkpoint as bitsandbytes lays it out: NF4 with double quantisation."""
    tensors = load_file(folder / "model.safetensors")
    packed: dict[str, FourBit] = {n: quantise(t) for n, t in tensors.items() if "_proj" in n}
    for name, four in packed.items():
        assert four.outer is not None
        assert four.mean is not None
        facts = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(four.shape),
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(four.mean),
        }  # fmt: skip
        text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
        tensors[name] = four.codes[:, None]
        tensors[f"{name}.absmax"] = four.scales
        tensors[f"{name}.nested_absmax"] = four.outer
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = text
    if change is not None:
        change(tensors)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix == ".json":
            (to / file.name).write_text(file.read_text())
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_checkpoint_in_four_bits_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    rounded = tt.load(folder, dtype="float32", storage="nf4")
    read = tt.load(stored(folder, tmp_path / "bnb"), dtype="float32")
    assert read.storage == "nf4"
    for name, module in rounded.model.named_modules():
        if isinstance(module, FourBitLinear):
            other = read.model.get_submodule(name)
            assert isinstance(other, FourBitLinear)
            assert torch.equal(module.codes, other.codes)
            assert torch.equal(module.scales, other.scales)
    assert torch.equal(logits(rounded), logits(read))
    with pytest.raises(ConfigError, match="stored in few bits already"):
        tt.load(tmp_path / "bnb", storage="int8")


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("absmax", "lacks weight.absmax"),
        ("nested_absmax", "lacks weight.nested_absmax"),
        ("quant_state.bitsandbytes__nf4", "lacks weight.quant_state.bitsandbytes__nf4"),
    ],
)
def test_missing_state_is_named(folder: Path, tmp_path: Path, lacks: str, says: str) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def without(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{name}.{lacks}"]

    with pytest.raises(ModelError, match=says):
        tt.load(stored(folder, tmp_path / "bnb", without))
