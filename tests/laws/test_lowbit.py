"""Adapters stored in 8 or 4 bits: every method, near what it was, the same again when it is stored again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab as tt
from tests.laws.cells import REFUSED, Cell, attached, registered, shaken
from tests.oracles.kit import quiet
from tests.tiny import CASES, output
from trimtab.adapt.files import OURS, WEIGHTS
from trimtab.adapt.lowbit import rounded, row_length
from trimtab.errors import ConfigError, FileFormatError

NEAR = {8: 0.03, 4: 0.4}
"""How far the outputs may move, as a share of what the adapter does to them."""
MASKS = ("piggyback",)
"""Scores are compared with a threshold: rounded, some fall on its other side. Their form to share is bits already."""
BITS = pytest.mark.parametrize("bits", [8, 4])
LLAMA = [Cell(name, "llama") for name in registered()]
OTHERS = [Cell(m, c) for m in ("lora", "dora", "full") for c in ("mixed", "mixtral")]


@BITS
@pytest.mark.parametrize("cell", [*LLAMA, *OTHERS], ids=lambda cell: cell.id)
@torch.no_grad()
def test_every_method_survives(cell: Cell, bits: int, tmp_path: Path) -> None:
    assert (cell.method, cell.model) not in REFUSED
    case = CASES[cell.model]
    model, inputs = case.model(torch.float32), case.inputs()
    base = output(model, inputs)
    adapter = shaken(tt.attach(model, cell.value(), "a"), 0.05)
    expected = output(model, inputs)
    if cell.method in MASKS:
        adapter = tt.exported(adapter)
    folder = adapter.save(tmp_path / "a", bits=bits)
    loaded = tt.Adapter.load(folder)
    fresh = case.model(torch.float32)
    tt.attach(fresh, loaded)
    moved = (output(fresh, inputs) - expected).norm() / (expected - base).norm()
    assert float(moved) <= NEAR[bits]
    for name, tensor in adapter.named().items():
        new = loaded.named()[name]
        whole = row_length(tuple(tensor.shape)) is None or name in adapter.fixed
        assert new.dtype == tensor.dtype and torch.equal(new, tensor) == whole, name
    loaded.save(tmp_path / "again", bits=bits)
    for file in (WEIGHTS, OURS):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_"), quiet():
        PeftModel.from_pretrained(case.model(torch.float32), folder)


@BITS
def test_its_size_and_its_error(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    adapter = shaken(tt.attach(model, tt.LoRA(rank=16, targets="0"), "a"))
    whole = adapter.save(tmp_path / "whole") / WEIGHTS
    packed = adapter.save(tmp_path / "packed", bits=bits)
    ratio = (packed / WEIGHTS).stat().st_size / whole.stat().st_size
    assert bits / 32 < ratio < bits / 32 + 0.025  # a scale for each of A's 16 rows and B's 512
    noted = json.loads((packed / OURS).read_text())["provenance"]["rounded"]
    loaded = tt.Adapter.load(packed)
    errors = [
        float((loaded.tensors[key] - t.detach()).norm() / t.detach().norm())
        for key, t in adapter.tensors.items()
    ]
    assert noted["bits"] == bits
    assert noted["error"]["max"] == pytest.approx(max(errors), rel=1e-3)
    assert noted["error"]["rms"] == pytest.approx((sum(e * e for e in errors) / 2) ** 0.5, rel=1e-3)
    assert max(errors) < {8: 0.01, 4: 0.16}[bits]
    assert loaded.origin.provenance["rounded"] == noted and not adapter.origin.provenance


def test_vectors_stay_whole_for_what_rounding_would_do_to_them() -> None:
    """Magnitudes are alike, so the steps of 4 bits are wide for all of them: 4 % each, on every channel."""
    magnitudes = torch.randn(768, 768, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    nearest = rounded(magnitudes.expand(2, -1), 4)[0]
    assert float((nearest - magnitudes).norm() / magnitudes.norm()) > 0.03
    for vector in (magnitudes, magnitudes[None], magnitudes[:, None]):
        assert torch.equal(rounded(vector, 4), vector)


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    model = CASES["llama"].model(torch.float32)
    folder = attached(Cell("lora", "llama"), model).save(tmp_path / "a", bits=4)
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    scale = f"{key}.row_scale"
    for change, message in (
        ({key: tensors[key] ^ 1}, "does not match its checksum"),
        ({scale: tensors[scale] * 2}, "does not match its checksum"),
        ({key: tensors[key][1:]}, "has not the 192 values"),
        ({scale: tensors[scale][1:]}, "has not the numbers and scales"),
    ):
        save_file({**tensors, **change}, folder / WEIGHTS)
        with pytest.raises(FileFormatError, match=message):
            tt.Adapter.load(folder)
    del tensors[scale]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(FileFormatError, match="numbers and scales"):
        tt.Adapter.load(folder)


def test_other_bits_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = CASES["llama"].model(torch.float32)
    adapter = attached(Cell("lora", "llama"), model)
    with pytest.raises(ConfigError, match="4 or 8 bits"):
        adapter.save(tmp_path / "a", bits=3)  # type: ignore[arg-type]
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        adapter.save(tmp_path / "a", bits=8)
    assert not (tmp_path / "a").exists()


# -- trained in few bits ------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("name", ["llama", "mixed", "mixtral"])
def test_lora_of_few_bits_is_stored_exactly(name: str, bits: int, tmp_path: Path) -> None:
    case = CASES[name]
    targets = {"llama": "all-linear", "mixed": ("embed", "re:conv.*", "grouped", "head")}
    method = tt.LoRA(rank=4, bits=bits, targets=targets.get(name, "**.experts.*_proj"))
    model, inputs = case.model(torch.float32), case.inputs()
    adapter = shaken(tt.attach(model, method, "a"))
    expected = output(model, inputs)
    merged = tt.merge(model, "a")
    torch.testing.assert_close(output(merged, inputs), expected, atol=1e-4, rtol=1e-4)
    for source in (adapter, tt.exported(adapter)):
        folder = source.save(tmp_path / source.name / source.method.kind, bits=bits)
        fresh = case.model(torch.float32)
        loaded = tt.attach(fresh, tt.Adapter.load(folder))
        assert torch.equal(output(fresh, inputs), expected)
    assert loaded.method == method.replace(bits=None)
    plain = case.model(torch.float32)
    tt.attach(plain, adapter.detached())
    whole = tt.attach(case.model(torch.float32), method.replace(bits=None), "b")
    assert whole.count == adapter.count
    loss = output(model, inputs).square().sum()
    loss.backward()  # straight through: the gradient is that of the rounded factors
    exact = tt.exported(adapter, name="exact")
    other = case.model(torch.float32)
    twin = tt.attach(other, exact)
    output(other, inputs).square().sum().backward()
    for key, tensor in adapter.tensors.items():
        theirs = twin.tensors[key].grad
        assert (tensor.grad is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(tensor.grad, theirs, atol=1e-4, rtol=1e-4)


def test_the_exported_form_of_lora_of_few_bits_is_peft_s(tmp_path: Path) -> None:
    case = CASES["llama"]
    model, inputs = case.model(torch.float32), case.inputs()
    adapter = shaken(tt.attach(model, tt.LoRA(rank=4, bits=8), "default"))
    adapter.save(tmp_path / "own")
    again = tt.Adapter.load(tmp_path / "own")
    assert again == adapter
    tt.exported(again).save(tmp_path / "plain")
    with quiet():
        theirs = PeftModel.from_pretrained(case.model(torch.float32), tmp_path / "plain")
    torch.testing.assert_close(output(theirs, inputs), output(model, inputs))
    with pytest.raises((ValueError, KeyError), match="TRIMTAB_"), quiet():
        PeftModel.from_pretrained(case.model(torch.float32), tmp_path / "own")


VARIANTS = [
    tt.LoRA(rank=4, bits=8),
    tt.LoRA(rank=4, bits=4),
    tt.LoRA(rank=4, frozen_a=True),
    tt.LoRA(rank=4, frozen_a=True, bits=8, plus=4),
]


@pytest.mark.parametrize(
    "method", VARIANTS, ids=lambda m: f"{m.bits}-{'frozen' if m.frozen_a else 'whole'}"
)
def test_variants_of_lora_mix_train_together_and_come_back(method: tt.LoRA, tmp_path: Path) -> None:
    case = CASES["llama"]
    model, inputs = case.model(), case.inputs()
    base = output(model, inputs)
    adapters = [shaken(tt.attach(model, method, name), seed=ord(name)) for name in "ab"]
    with tt.rows(model, ["a", None, "b", "a"]):
        together = output(model, inputs)
        together.square().sum().backward()
    gradients = [{k: t.grad for k, t in adapter.tensors.items()} for adapter in adapters]
    assert torch.allclose(together[1], base[1], atol=1e-9)
    for adapter, rows, found in zip(adapters, ([0, 3], [2]), gradients, strict=True):
        for parameter in adapter.parameters():
            parameter.grad = None
        with tt.using(model, adapter.name):
            alone = output(model, {"input_ids": inputs["input_ids"][rows]})
            alone.square().sum().backward()
        assert torch.allclose(together[rows], alone, atol=1e-9)
        for key, tensor in adapter.tensors.items():
            assert (tensor.grad is None) == (found[key] is None) == (not tensor.requires_grad)
            if tensor.grad is not None:
                torch.testing.assert_close(tensor.grad, found[key], atol=1e-6, rtol=1e-5)
    adapters[0].save(tmp_path / "a")
    fresh = case.model()
    tt.attach(fresh, tt.Adapter.load(tmp_path / "a"))
    with tt.using(model, "a"):
        assert torch.equal(output(fresh, inputs), output(model, inputs))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_few_bits_compile() -> None:
    torch._dynamo.reset()
    case = CASES["llama"]
    model, inputs = case.model(torch.float32), {**case.inputs(), "use_cache": False}
    shaken(tt.attach(model, tt.LoRA(rank=4, bits=8), "a"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(output(compiled, inputs), output(model, inputs), atol=1e-5)
