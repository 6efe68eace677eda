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
from trimtab.frozen.formats import FORMATS
from trimtab.frozen.fourbit import FourBitLinear
from trimtab.frozen.lowbit import LowBitLinear
from trimtab.kernels.fourbit import FourBit, quantise
from trimtab.models.quantise import rounded, targets
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
        tt.load(folder, storage="nf5")


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


@pytest.mark.parametrize("storage", STORAGES)
def test_training_leaves_every_bit_of_the_base_as_it_is(folder: Path, storage: Any) -> None:
    base = tt.load(folder, dtype="float32", storage=storage)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    adapter = tt.attach(base.model, "lora(rank=2)|bitfit", "a")
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    base.model.train()
    ids = torch.arange(3, 11)[None]
    for _ in range(3):
        base.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
    tt.merge(base.model, "a")
    tt.detach(base.model, "a")
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "method",
    [
        tt.Full(targets="q_proj"),
        tt.LoRA(targets="v_proj", train=("q_proj",)),
        tt.LoRA(targets="v_proj", train=("layers.0.mlp",)),
    ],
    ids=["full", "train", "train-inside"],
)
def test_a_weight_in_few_bits_is_not_trained_itself(
    folder: Path, storage: Any, method: tt.Method
) -> None:
    base = tt.load(folder, storage=storage)
    with pytest.raises(UnsupportedError, match="cannot be trained itself"):
        tt.attach(base.model, method, "a")
    assert not hasattr(base.model, "trimtab")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# -- what cannot be rounded --------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gguf", [False, True], ids=["streamed", "dense"])
def test_weights_that_are_not_finite_are_named(
    folder: Path, tmp_path: Path, storage: Any, value: float, gguf: bool
) -> None:
    model = tt.load(folder, dtype="float32").model
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5:7] = value
    says = rf"{name}.weight: 2 of 6,144 values of the weight are NaN, infinite or beyond float32"
    if gguf:  # what came densely is rounded afterwards
        with pytest.raises(ModelError, match=says):
            rounded(model, storage, ())
        return
    model.save_pretrained(tmp_path)
    kit.base().tokenizer.save_pretrained(tmp_path)
    tt.load(tmp_path, dtype="float32")
    with pytest.raises(ModelError, match=says):
        tt.load(tmp_path, dtype="float32", storage=storage)


@pytest.mark.parametrize("storage", FORMATS)
def test_dtypes_that_no_format_is_made_of(storage: str) -> None:
    for weight in (
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
        torch.ones(4, 4, dtype=torch.complex64),
    ):
        with pytest.raises(ModelError, match="only floating values of 16 bits or more"):
            FORMATS[storage](weight, None)
    with pytest.raises(ModelError, match="beyond float32"):
        FORMATS[storage](torch.full((4, 4), 1e300, dtype=torch.float64), None)
    wide = torch.randn(8, 8, dtype=torch.float64)
    assert FORMATS[storage](wide, None).dense(torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool], ids=str
)
def test_a_base_does_not_compute_in_any_dtype(folder: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="a base computes in bfloat16, float16, float32"):
        tt.load(folder, dtype=dtype, storage="nf4")


@pytest.mark.parametrize("bits", ["nf3", "int3", "int2", "8", "fp16"])
def test_widths_that_there_are_not(folder: Path, bits: Any) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown storage '{bits}'"):
        tt.load(folder, storage=bits)


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


def test_state_that_does_not_fit_its_weight_is_named(folder: Path, tmp_path: Path) -> None:
    """Codes cut short; blocks of a size that does not go with the scales; a state that is no JSON."""
    name = "model.layers.1.self_attn.q_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"

    def short(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-8]

    def blocks(tensors: dict[str, Tensor]) -> None:
        facts = json.loads(bytes(tensors[state].tolist())) | {"blocksize": 48}
        tensors[state] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    def torn(tensors: dict[str, Tensor]) -> None:
        tensors[state] = tensors[state][:-5]

    for number, (change, says) in enumerate(
        (
            (short, "2,040 bytes of codes .* are not those of a weight of 64 × 64"),
            (blocks, "64 scales in blocks of 48 are not those of"),
            (torn, "is no JSON"),
        )
    ):
        with pytest.raises(ModelError, match=says):
            tt.load(stored(folder, tmp_path / str(number), change))
