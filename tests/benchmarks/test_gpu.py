"""The benchmark of a GPU, tiny and on the CPU: all sides run and compute the same, and nothing that fails is lost."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu, gpu_sides

BNB = util.find_spec("bitsandbytes") is not None
GIVEN: dict[str, Any] = {"shape": gpu_sides.TINY, "device": "cpu", "tokens": 32, "rows": 1, "rank": 4}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The sides silence the libraries in a process of their own; here that ends with the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ran(name: str, **more: Any) -> dict[str, Any]:
    kind, own = gpu.SIDES[name]
    own = {key: value for key, value in own.items() if key != "plain"}  # it would hide it for good
    side = {"Trimtab": gpu_sides.Trimtab, "Peft": gpu_sides.Peft}[kind]
    return side(**{**GIVEN, **own, **more}).run(1, 2)


@pytest.mark.parametrize("stored", ["bf16", "NF4"])
def test_all_sides_compute_the_same(stored: str) -> None:
    if stored == "NF4" and not BNB:
        pytest.skip("bitsandbytes is not installed")
    rows = {name: ran(name) for name in gpu.SIDES if ("NF4" in name) is (stored == "NF4")}
    assert len(rows) == 4
    losses = gpu.losses_of(rows, stored)
    assert len(losses) == 4 and gpu.apart(losses) < 0.01
    for row in rows.values():
        assert len(row["losses"]) == 3 and len(row["seconds"]) == 2 and row["units"] == 32
        assert row["peak_operations"] > 0 and row["allocated"] > 0
        assert (row["trained"], row["P"]) == (rows[next(iter(rows))]["trained"], sizes())
    assert any("NF4" in line or "bf16" in line for line in gpu.verdicts(rows))


def sizes() -> int:
    width, inner, vocabulary = 128, 256, 512
    block = 2 * width * width + 2 * width * width // 2 + 3 * width * inner + 2 * width
    return 2 * block + width + vocabulary * width


def test_memory_that_runs_out_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(work: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(gpu_sides.Work, "decoder", full)
    assert ran("peft") == {"out_of_memory": "CUDA out of memory"}


@pytest.mark.usefixtures("forked")
def test_one_call_writes_everything(tmp_path: Path) -> None:
    names = ["peft, blocks recomputed", "trimtab, NF4"]
    options = ["--tiny", "--sides", *names, "--warmup", "1", "--steps", "2", "--threads", "1"]
    assert command.main(["gpu", *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert list(found["sides"]) == names
    assert not [row for row in found["sides"].values() if "seconds" not in row]
    kernels = {proof["kernel"] for proof in found["proofs"]}
    assert "loss by chunks" in kernels and all(proof["equal"] for proof in found["proofs"])
    text = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| peft, blocks recomputed |" in text and "## Kernels beside their plain twins" in text
    ElementTree.fromstring((tmp_path / "gpu.svg").read_text("utf-8"))


def test_targets_are_judged() -> None:
    def row(seconds: float, **more: Any) -> dict[str, Any]:
        return {
            "units": 4096, "seconds": [seconds], "losses": [12.0], "P": 7.5e9, "trained": 42e6,
            "peak_operations": 7.5e14, "allocated": 28e9, "reserved": 30e9, **more,
        }  # fmt: skip

    rows = {"trimtab": row(0.25), "peft": row(0.5), gpu.NF4: row(0.3), "peft, x": {"failed": "no"}}
    text = "\n".join(gpu.verdicts(rows))
    assert "16,000 tokens/s: met (16,384)" in text and "30 GB: met (28.0)" in text
    assert "within 12% of it: **not met** (0.83 of its rate)" in text
    assert "2.00 × its rate" in text
    assert gpu.figures(rows["trimtab"])["share"] == pytest.approx(4 * 7.5e9 * 16384 / 7.5e14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--out", str(tmp_path)]) == 1
    assert "no CUDA device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
