"""A head that is trained by its role is one that PEFT finds in the file, whatever the model calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import trimtab as tt
from tests.oracles import kit
from tests.tiny import CASES, output
from trimtab.adapt.disk import read_json


@pytest.mark.parametrize("family", ["vit", "classifier", "bert", "roberta"])
def test_a_head_trained_by_its_role(family: str, tmp_path: Path) -> None:
    case = CASES[family]
    model, inputs = case.model(torch.float32).eval(), case.inputs()
    adapter = tt.attach(model, tt.LoRA(rank=2, train=("head",)), "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = output(model, inputs)
    adapter.save(tmp_path / "a")
    assert "head" not in read_json(tmp_path / "a" / "adapter_config.json")["modules_to_save"]
    with kit.quiet():
        theirs = PeftModel.from_pretrained(case.model(torch.float32).eval(), tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(output(theirs, inputs), expected, atol=1e-5, rtol=1e-5)
    again = case.model(torch.float32).eval()
    tt.attach(again, tt.Adapter.load(tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(output(again, inputs), expected)
