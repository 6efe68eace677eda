"""The LoRA step, tiny: both sides compute the same, and the report has what it promises."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import __main__ as command
from benchmarks import lora_step
from tests.engine import kit
from tests.oracles.kit import DEPRECATED

OPTIONS = {"rows": 2, "tokens": 16, "rank": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    base = kit.base()
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def test_both_sides_have_the_same_gradients(model: str, tmp_path: Path) -> None:
    found = {}
    for side in (lora_step.Trimtab, lora_step.Peft):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=DEPRECATED)
            made = side(model=model, **OPTIONS)
        made.gradients(str(tmp_path / "grads"))
        found[side] = load_file(tmp_path / "grads"), made.facts()
    (ours, sizes), (peer, peer_sizes) = found.values()
    assert sizes == peer_sizes
    assert ours.keys() == peer.keys() and len(ours) == 2 * 7 * 2
    for name, gradient in ours.items():
        # Coarse: a tiny random model in bf16.
        assert torch.cosine_similarity(gradient.flatten(), peer[name].flatten(), 0) > 0.98, name


@pytest.mark.usefixtures("forked")
def test_it_measures_and_writes_a_report(model: str, tmp_path: Path) -> None:
    options = ["--model", model, "--rows", "2", "--tokens", "16", "--rank", "4", "--rounds", "2"]
    options += ["--warmup", "1", "--patience", "0", "--threads", "1", "--allocator", "tuned"]
    assert command.main(["lora_step", *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "lora_step.json").read_text("utf-8"))
    (row,) = found["rows"]
    assert row["allocator"] == "tuned" and row["loss_apart"] < lora_step.LOSS_TOLERANCE
    assert row["speed_ratio"]["low"] <= row["speed_ratio"]["median"] <= row["speed_ratio"]["high"]
    assert {sample["side"] for sample in row["samples"]} == {"trimtab", "peft", "matmul"}
    assert sum(s["counted"] for s in row["samples"]) == 2 * 3
    assert found["versions"]["peft"] and found["machine"]["cpu"] and found["work"]["P"] > 0
    table = (tmp_path / "lora_step.md").read_text("utf-8")
    assert "| tuned | **ratio** |" in table and "peak memory" in table


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["lora"]) == 2
    assert "no benchmark 'lora'; there are: lora_step" in capsys.readouterr().err
