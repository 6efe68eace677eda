"""``sentence-transformers``, where it is installed, trains an encoder with adapters of `trimtab.peft` in it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch

import trimtab.peft as ours
from tests import tiny
from tests.data import kit
from tests.peft.ecosystem_kit import arguments, close, filled, learned, losses

st = pytest.importorskip("sentence_transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
LOSSES = "sentence_transformers.sentence_transformer.losses"
TEXTS = ["the sea is deep", "a ship turns", "one two three", "two lines of text"]


def folder_of(tmp_path: Path) -> Path:
    """A tiny encoder and its tokenizer on disk."""
    made = kit.byte_level()
    model = tiny.bert().bert
    model.resize_token_embeddings(len(made), mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "base")
    made.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def encoder(folder: Path) -> Any:
    """With mean pooling, as the package has it where a folder says nothing."""
    return st.SentenceTransformer(str(folder), device="cpu")


def data() -> Any:
    return datasets.Dataset.from_dict(
        {"anchor": TEXTS * 2, "positive": (TEXTS[1:] + TEXTS[:1]) * 2}
    )


@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_training_gives_the_losses_of_peft(way: str, tmp_path: Path) -> None:
    folder, runs = folder_of(tmp_path), []
    for package in (ours, peft):
        model = encoder(folder)
        config = package.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
        if way == "add_adapter":
            model.add_adapter(config)
        else:
            words = model[0]
            name = "model" if "model" in words._modules else "auto_model"
            words._modules[name] = package.get_peft_model(words._modules[name], config)
        filled(model)
        trainer = st.SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path / package.__name__, st.SentenceTransformerTrainingArguments),
            train_dataset=data(),
            loss=import_module(LOSSES).MultipleNegativesRankingLoss(model),
        )
        assert learned(model)
        trainer.train()
        runs.append((losses(trainer), torch.tensor(model.encode(TEXTS))))
    close(runs[0][0], runs[1][0])
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-5)


def test_an_encoder_is_saved_with_its_adapter_and_loaded(tmp_path: Path) -> None:
    model = encoder(folder_of(tmp_path))
    model.add_adapter(ours.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    filled(model)
    expected = torch.tensor(model.encode(TEXTS))
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.allclose(torch.tensor(again.encode(TEXTS)), expected, atol=1e-6)
