"""The DoRA step, tiny: both sides compute the same, and a quick run writes its report."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import __main__ as command
from benchmarks import dora_step
from tests.oracles.kit import DEPRECATED

OPTIONS = {"model": "random", "rows": 2, "tokens": 16, "rank": 4, "width": 64, "layers": 2}


def test_both_sides_have_the_same_gradients(tmp_path: Path) -> None:
    found = {}
    for side in (dora_step.Trimtab, dora_step.Peft):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=DEPRECATED)
            made = side(**OPTIONS)
        made.gradients(str(tmp_path / "grads"))
        found[side] = load_file(tmp_path / "grads"), made.facts()
    (ours, sizes), (peer, peer_sizes) = found.values()
    assert sizes == peer_sizes
    assert ours.keys() == peer.keys() and len(ours) == 2 * 7 * 3
    for name, gradient in ours.items():
        # Coarse: a tiny random model in bf16.
        assert torch.cosine_similarity(gradient.flatten(), peer[name].flatten(), 0) > 0.98, name


@pytest.mark.usefixtures("forked")
def test_a_quick_run_writes_a_report(tmp_path: Path) -> None:
    options = ["--quick", "--width", "64", "--threads", "1", "--allocator", "tuned"]
    assert command.main(["dora_step", *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "dora_step.json").read_text("utf-8"))
    assert found["rows"][0]["loss_apart"] < 0.02 and found["work"]["width"] == 64
    assert "DoRA r=16" in (tmp_path / "dora_step.md").read_text("utf-8")
