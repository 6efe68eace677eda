"""``model.add_adapter`` of transformers itself, with our configurations: it calls PEFT, and PEFT calls our tuner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import trimtab as tt
import trimtab.peft as ours
from tests import tiny
from tests.peft.ecosystem_kit import close, filled, learned, lora, losses, train
from trimtab.errors import AttachError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def model_of(package: Any, **options: Any) -> Any:
    model = tiny.llama(num_hidden_layers=2)
    model.add_adapter(lora(package, **options))
    return filled(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 9)[None]).logits
    return found


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's own
def test_adapters_are_added_switched_and_trained(tmp_path: Path) -> None:
    mine, theirs = model_of(ours), model_of(peft)
    bare = logits(tiny.llama(num_hidden_layers=2))
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-6)
    for model, package in ((mine, ours), (theirs, peft)):
        model.add_adapter(lora(package, r=2), adapter_name="other")
        filled(model, "other")
        assert model.active_adapters() == ["other"]
        assert {name.split(".")[-2] for name in learned(model)} == {"other"}
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-6)
    for model in (mine, theirs):
        model.disable_adapters()
    assert torch.equal(logits(mine), bare)
    for model in (mine, theirs):
        model.enable_adapters()
        model.set_adapter(["default", "other"])
    assert torch.allclose(logits(mine), logits(theirs), atol=1e-6)
    for model in (mine, theirs):
        model.set_adapter("default")
    runs = [train(model.train(), tmp_path / str(n)) for n, model in enumerate((mine, theirs))]
    close(*map(losses, runs))


def test_what_it_saves_is_an_adapter_to_everybody(tmp_path: Path) -> None:
    model = model_of(ours)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for package in (ours, peft):
        found = package.PeftModel.from_pretrained(tiny.llama(num_hidden_layers=2), str(tmp_path))
        assert torch.allclose(logits(found), expected, atol=1e-6)
    other = tiny.llama(num_hidden_layers=2)
    other.load_adapter(str(tmp_path))  # PEFT's own layers: the folder says nothing of us
    assert torch.allclose(logits(other), expected, atol=1e-6)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = model_of(ours)
    with pytest.raises(UnsupportedError, match=r"trimtab\.detach"):
        model.delete_adapter("default")
    with pytest.raises(AttachError, match="adapters already"):
        tt_model = tiny.llama(num_hidden_layers=2)
        tt.attach(tt_model, "ia3")
        tt_model.add_adapter(lora(ours))
    config = ours.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    bare = tiny.llama(num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match="get_peft_model"):
        bare.add_adapter(config)
    assert not any("trimtab" in name for name, _ in bare.named_modules())


def test_inject_adapter_in_model_is_the_same_without_transformers() -> None:
    model = tiny.llama(num_hidden_layers=2)
    assert ours.inject_adapter_in_model(lora(ours), model) is model
    ours.inject_adapter_in_model(lora(ours, r=2), model, "other")
    assert list(model.peft_config) == ["default", "other"]
    assert torch.allclose(logits(filled(model)), logits(model_of(peft)), atol=1e-6)
