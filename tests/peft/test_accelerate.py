"""``accelerate``: a model of `trimtab.peft` is one of PEFT's to it, and two ranks train it as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model

import trimtab.peft as ours
from tests import tiny
from tests.peft import ranks
from tests.peft.ecosystem_kit import filled, lora

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    ranks.start(tmp_path)


def test_one_process_gives_the_losses_of_peft(tmp_path: Path) -> None:
    found: list[list[float]] = []
    for package in (ours, peft):
        accelerator = Accelerator(cpu=True)
        model = filled(package.get_peft_model(tiny.llama(), lora(package)))
        assert is_peft_model(model)
        learning = [p for p in model.parameters() if p.requires_grad]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(learning, lr=1e-2))
        found.append(ranks.steps(model, model, optimizer, accelerator, slice(None))[0])
    assert torch.allclose(*map(torch.tensor, found), atol=1e-5)


def test_a_state_is_saved_and_loaded(tmp_path: Path) -> None:
    """``save_state`` and ``load_state`` hold the adapter as they hold any model."""

    def begin() -> tuple[Any, Any]:
        accelerator = Accelerator(cpu=True)
        return accelerator, accelerator.prepare(
            filled(ours.get_peft_model(tiny.llama(), lora(ours)))
        )

    accelerator, model = begin()
    with torch.no_grad():
        for parameter in ranks.trained(model):
            parameter.add_(1)
    accelerator.save_state(str(tmp_path))
    again, other = begin()
    again.load_state(str(tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
