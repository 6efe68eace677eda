"""The plain ``transformers.Trainer`` trains, saves and resumes a model with adapters, knowing nothing of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import trimtab as tt
from tests import tiny as models
from trimtab.adapt.probe import bare_state

STEPS = 4


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of eight tokens; the first three are the prompt."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = torch.randint(
            3, models.VOCABULARY, (8,), generator=torch.Generator().manual_seed(row)
        )
        return {"input_ids": ids, "labels": torch.cat([torch.full((3,), -100), ids[3:]])}


def adapted(method: str) -> tuple[nn.Module, tt.Adapter]:
    model = models.llama(num_hidden_layers=2)
    return model, tt.attach(model, method, "a")


def train(model: nn.Module, folder: Path, *, resume: bool = False, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=STEPS, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, seed=0, **{"save_strategy": "no", **options},
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bare_state(model).items()}


@pytest.mark.parametrize(
    "method", ["lora(rank=2, dropout=0.1)", "dora(rank=2)", "ia3", "bottleneck(size=4)", "prefix(length=3)",
               "spottune(hidden=4)"]
)  # fmt: skip
def test_it_trains_the_adapter_and_nothing_else(method: str, tmp_path: Path) -> None:
    model, adapter = adapted(method)
    before, first = state(model), adapter.detached()
    trainer = train(model, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and all(loss == loss for loss in losses)
    assert state(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert adapter != first
    optimised = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimised == adapter.count


@pytest.mark.parametrize("method", ["lora(rank=2)", "prefix(length=3)"])
def test_activation_checkpointing_changes_nothing(method: str, tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    switch = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    found = []
    for recompute in (False, True):
        model, adapter = adapted(method)
        train(model, tmp_path, **{switch: recompute})
        found.append(adapter.tensors)
    for key, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][key], atol=1e-5), key


@pytest.mark.parametrize("method", ["lora(rank=2)", "prefix(length=3)"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, tmp_path: Path) -> None:
    whole, expected = adapted(method)
    train(whole, tmp_path, save_strategy="steps", save_steps=2)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    model, adapter = adapted(method)
    train(model, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert adapter == expected


def test_two_adapters_and_only_one_learns(tmp_path: Path) -> None:
    model, learning = adapted("lora(rank=2)")
    frozen = tt.attach(model, "bottleneck(size=4)", "b", trainable=False)
    before, first = frozen.detached(), learning.detached()
    train(model, tmp_path)
    assert frozen == before and learning != first
