"""`AutoPeftModel` and its kin, from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab.peft as ours
from tests import tiny
from tests.peft.ecosystem_kit import filled
from trimtab.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "CausalLM": (tiny.llama, "CAUSAL_LM", {"target_modules": ["q_proj"]}),
    "Seq2SeqLM": (tiny.t5, "SEQ_2_SEQ_LM", {"target_modules": ["q"]}),
    "SequenceClassification": (tiny.bert, "SEQ_CLS", {"target_modules": ["query"]}),
}


def saved(kind: str, package: Any, folder: Path, task: str | None) -> Any:
    make, _, options = KINDS[kind]
    base = make()
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    model = package.get_peft_model(base, package.LoraConfig(r=4, task_type=task, **options))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 9)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("package", [ours, peft], ids=["ours", "peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_brings_its_base(kind: str, package: Any, tmp_path: Path) -> None:
    model = saved(kind, package, tmp_path, KINDS[kind][1])
    cls = getattr(ours, f"AutoPeftModelFor{kind}")
    found = cls.from_pretrained(str(tmp_path / "adapter")).eval()
    assert type(found) is getattr(ours, f"PeftModelFor{kind}")
    assert torch.allclose(logits(found), logits(model), atol=1e-6)
    assert not any(p.requires_grad for p in found.parameters())
    trained = cls.from_pretrained(tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16)
    learning = [p for p in trained.parameters() if p.requires_grad]
    assert learning and {p.dtype for p in learning} == {torch.float32}
    assert trained.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_an_adapter_without_a_task(cls: str, tmp_path: Path) -> None:
    model = saved("CausalLM", ours, tmp_path, None)
    found = getattr(ours, cls).from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(found), logits(model))
    assert type(found.get_base_model()) is type(model.get_base_model())


def test_a_wrong_class_is_told_the_right_one(tmp_path: Path) -> None:
    saved("CausalLM", ours, tmp_path, "CAUSAL_LM")
    for cls in (ours.AutoPeftModelForSeq2SeqLM, ours.AutoPeftModel):
        with pytest.raises(ConfigError, match="AutoPeftModelForCausalLM"):
            cls.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        ours.AutoPeftModelForCausalLM()


def test_a_file_imports_no_package_that_nobody_allowed(tmp_path: Path) -> None:
    saved("CausalLM", peft, tmp_path, None)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["auto_mapping"] = {"base_model_class": "PurePath", "parent_library": "pathlib"}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="import_allowlist"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_a_base_that_is_not_named_is_asked_for(tmp_path: Path) -> None:
    model = filled(ours.get_peft_model(tiny.llama(), ours.LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"PeftModel\.from_pretrained"):
        ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
