"""What the tests with other libraries share: values decided by names alone, rows of tokens, and short runs."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests import tiny

STEPS = 4
TARGETS = ["q_proj", "v_proj"]


def lora(package: Any, **options: Any) -> Any:
    """The same LoRA of either package."""
    return package.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **options}
    )  # fmt: skip


@torch.no_grad()
def filled(model: nn.Module, adapter: str = "default") -> Any:
    """The model, its adapter's values drawn by the parameters' names: equal in both packages, which name them alike."""
    for name, parameter in model.named_parameters():
        if f".{adapter}." in f"{name}.":
            seed = torch.Generator().manual_seed(zlib.crc32(name.split("module.")[-1].encode()))
            drawn = torch.randn(parameter.shape, generator=seed) * 0.1
            parameter.copy_(drawn.to(parameter.dtype))
    return model


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows of eight tokens; the first three are the prompt, or there is one label a row."""

    def __init__(self, classes: int = 0) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = torch.randint(3, tiny.VOCABULARY, (8,), generator=torch.Generator().manual_seed(row))
        if self.classes:
            return {"input_ids": ids, "labels": torch.tensor(row % self.classes)}
        return {"input_ids": ids, "labels": torch.cat([torch.full((3,), -100), ids[3:]])}


def arguments(folder: Path, kind: Any = TrainingArguments, **options: Any) -> Any:
    """Arguments of a trainer for a few quick steps on the CPU."""
    return kind(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-2, "use_cpu": True, "seed": 0,
            "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", **options,
        },
    )  # fmt: skip


def train(model: nn.Module, folder: Path, *, resume: Any = None, **options: Any) -> Trainer:
    """A `Trainer` that has trained the model."""
    parts = {k: options.pop(k) for k in ("eval_dataset", "train_dataset") if k in options}
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        **{"train_dataset": Rows(), **parts},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def close(ours: list[float], theirs: list[float]) -> None:
    """Losses of the two packages are equal to rounding, and something was learned from them."""
    assert len(ours) == len(theirs) > 1
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=2e-5, atol=2e-6), (
        ours,
        theirs,
    )


def learned(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what a model trains."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 0.0) -> None:
    """Two sets of tensors are equal."""
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert torch.allclose(tensor, b[name], rtol=0, atol=atol), (
            name,
            float((tensor - b[name]).abs().max()),
            float(tensor.abs().max()),
        )


def files(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
    }
