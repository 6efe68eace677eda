"""The benchmarks of bases in few bits, tiny: they run from end to end, and their figures are sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import big_base, dequantise, qlora_quality, quantisers
from benchmarks.lora_step import LOSS_TOLERANCE
from tests import tiny
from tests.engine import kit

TINY = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def test_a_big_base_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(big_base, "SHAPE", TINY)
    options = ["--tokens", "16", "--steps", "2", "--rank", "2", "--out", str(tmp_path)]
    assert command.main(["big_base", *options]) == 0
    found = json.loads((tmp_path / "big_base.json").read_text("utf-8"))
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found["parameters"] == 2 * block + 2 * 49152 * 64 + 64
    for run in found["runs"]:
        assert run["trained"] == 2 * (4 * (64 + 64) + 3 * (64 + 128)) * 2
        assert run["before"] < run["loaded"] <= run["peak"] < 4e9
        assert run["steps"][0]["loss"] == pytest.approx(10.8, abs=0.3)  # ln 49152: it knows nothing
    assert "| plain torch |" in (tmp_path / "big_base.md").read_text("utf-8")


@pytest.mark.usefixtures("forked")
def test_the_step_on_a_stored_base_is_that_of_the_peer(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = kit.base(tiny.llama(hidden_size=64, intermediate_size=128))  # rows of whole blocks
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--rows", "2", "--tokens", "16", "--rank", "4"]
    options += ["--rounds", "2", "--warmup", "1", "--patience", "0", "--threads", "1"]
    options += ["--allocator", "tuned", "--out", str(tmp_path), "--plain"]
    assert command.main(["qlora_step", *options]) == 0
    found = json.loads((tmp_path / "qlora_step_plain.json").read_text("utf-8"))
    (row,) = found["rows"]
    assert row["loss_apart"] < LOSS_TOLERANCE and set(row["sides"]) == {"nf4", "bf16", "peft"}
    assert found["work"]["storage"] == "nf4" and found["work"]["bitsandbytes"]
    assert "**nf4 / peft**" in (tmp_path / "qlora_step_plain.md").read_text("utf-8")


def test_more_bits_round_less() -> None:
    found = {name: quantisers.errors(name) for name in ("int8", "nf4", "fp4")}
    for name, bits in (("int8", 8), ("nf4", 4.127), ("fp4", 4.127)):
        assert found[name]["bits"] == pytest.approx(bits, rel=0.02), name
    assert all(len(entry["layers"]) == 37 for entry in found.values())
    for layer, fp4 in found["fp4"]["layers"].items():
        nf4, int8 = found["nf4"]["layers"][layer], found["int8"]["layers"][layer]
        assert int8["weight"] < nf4["weight"] / 4 and nf4["weight"] < fp4["weight"] < 0.2


def test_the_difference_of_quality_is_that_of_the_means() -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    runs = [
        {
            "rows": 8, "base": base, "seed": seed, "held_out_loss": {**interval, "value": loss}, "commit": "c",
            "accuracy": interval, "forgetting": {}, "peak_bytes": 2**30,
        }
        for base, losses in (("bf16", (0.2, 0.3, 0.4)), ("NF4", (0.21, 0.31, 0.41)))
        for seed, loss in enumerate(losses)
    ]  # fmt: skip
    text = qlora_quality.table([*runs, {**runs[0], "rows": 16}])
    assert "bf16 0.3000, accuracy 0.9000; NF4 0.3100 (+0.0100), accuracy 0.9000." in text
    assert text.index("## 8 reviews") < text.index("bf16 0.3000") < text.index("## 16 reviews")
    assert text.count("Means over") == 1, "not before all seeds are there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_comparison_of_kernels_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["dequantise", "--out", str(tmp_path)]) == 1
    assert "no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_ways_to_a_dense_weight_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise, "SHAPES", ((64, 128),))
    assert command.main(["dequantise", "--rounds", "3", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "dequantise.json").read_text("utf-8"))
    assert {entry["format"] for entry in found["entries"]} == {"NF4", "INT8"}
    for entry in found["entries"]:
        for way in entry["ways"].values():
            assert len(way["ms"]) == 3
            assert way["off"] <= torch.finfo(getattr(torch, entry["dtype"])).eps
    assert "| plain torch |" in (tmp_path / "dequantise.md").read_text("utf-8")
