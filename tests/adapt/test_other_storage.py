"""Adapters between a base and the same base in another storage: the same base, with a warning; others are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from tests.engine import kit
from tests.laws.cells import shaken
from trimtab.adapt.fingerprint import Fingerprint, storage_of
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import BaseMismatchError
from trimtab.models.load import Base

STORAGES = [None, "nf4", "fp4", "int4", "int8", "fp8", "loftq(rank=4, iters=2)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write(path, lambda model: None)
    return path


def write(path: Path, change: Any) -> Path:
    base = kit.base()
    with torch.no_grad():
        change(base.model)
    base.model.save_pretrained(path)
    base.tokenizer.save_pretrained(path)
    return path


def adapter(folder: Path, to: Path, **options: Any) -> Path:
    base = tt.load(folder, dtype="float32", **options)
    return shaken(tt.attach(base.model, tt.LoRA(rank=2), "a"), 0.05).save(to / "a")


def attached(base: Base, folder: Path) -> list[str]:
    """Attach it, and what is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tt.attach(base.model, tt.Adapter.load(folder))
    return [str(one.message) for one in told]


@pytest.mark.parametrize("there", STORAGES)
@pytest.mark.parametrize("here", STORAGES)
def test_it_moves_between_storages_with_a_warning(
    folder: Path, tmp_path: Path, there: Any, here: Any
) -> None:
    saved = adapter(folder, tmp_path, storage=there)
    base = tt.load(folder, dtype="float32", storage=here)
    told = attached(base, saved)
    if there == here:
        assert not told
        return
    (text,) = told
    for where, storage in (("there", there), ("here", here)):
        assert (
            f"{where} {f'linear layers are in {storage}' if storage else 'all layers are dense'}"
            in text
        )


@pytest.mark.parametrize("there", STORAGES)
@pytest.mark.parametrize("here", STORAGES)
@pytest.mark.parametrize("what", ["embed_tokens", "norm"])
def test_a_wrong_base_is_an_error_in_any_storage(
    folder: Path, tmp_path: Path, there: Any, here: Any, what: str
) -> None:
    """What is dense in every storage tells two bases apart, even where one is a fine-tuned form of the other."""

    def change(model: Any) -> None:
        weight = (
            model.model.embed_tokens.weight if what == "embed_tokens" else model.model.norm.weight
        )
        weight.add_(0.02 * torch.randn_like(weight))

    saved = adapter(folder, tmp_path, storage=there)
    other = tt.load(write(tmp_path / "other", change), dtype="float32", storage=here)
    with pytest.raises(BaseMismatchError, match="the weights differ"):
        tt.attach(other.model, tt.Adapter.load(saved))


@pytest.mark.parametrize("storage", STORAGES)
def test_layers_in_few_bits_are_compared_with_their_like(
    folder: Path, tmp_path: Path, storage: Any
) -> None:
    """Another base whose norms and embeddings are the same: it is noticed where both are stored alike."""

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.add_(0.1 * torch.randn_like(layer.mlp.up_proj.weight))

    saved = adapter(folder, tmp_path, storage=storage)
    other = tt.load(write(tmp_path / "other", change), dtype="float32", storage=storage)
    with pytest.raises(BaseMismatchError, match="the weights differ"):
        tt.attach(other.model, tt.Adapter.load(saved))


def test_codes_that_were_rounded_from_another_dtype_are_not_compared(
    folder: Path, tmp_path: Path
) -> None:
    """Rounded from bfloat16, a few codes are others: that is no other base."""
    saved = adapter(folder, tmp_path, storage="nf4")
    assert not attached(tt.load(folder, dtype="bfloat16", storage="nf4"), saved)
    assert not attached(tt.load(folder, dtype="float32", storage="nf4"), saved)


def test_the_record_says_how_to_load_the_base_again(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"storage": "nf4", "exempt": ["down_proj", "*.layers.0.*q_proj=int8"]}
    saved = tt.Adapter.load(adapter(folder, tmp_path, **options))
    assert saved.base is not None
    assert saved.base.storage == "nf4"
    assert saved.base.exempt == ("down_proj", "lm_head", "model.layers.0.self_attn.q_proj=int8")
    again = tt.load(folder, dtype="float32", storage="nf4", exempt=saved.base.exempt)
    assert storage_of(anatomy_of(again.model).modules) == ("nf4", saved.base.exempt)
    assert not attached(again, tmp_path / "a")
    mixed = adapter(folder, tmp_path / "m", storage="nf4", average_bits=6.0)
    found = tt.Adapter.load(mixed).base
    assert found is not None
    again = tt.load(folder, dtype="float32", storage=found.storage, exempt=found.exempt)
    assert not attached(again, mixed)
    (text,) = attached(tt.load(folder, dtype="float32", storage="nf4"), mixed)
    assert "=int8" in text


def test_folders_that_were_written_before_are_read(folder: Path) -> None:
    """Without a storage: the samples that were taken then are taken now, too."""
    base = tt.load(folder, dtype="float32")
    now = tt.attach(base.model, tt.LoRA(rank=2), "a").base
    assert now is not None
    names = sorted(n for n, p in kit.llama().named_parameters())
    names = [n for n in names if n != "lm_head.weight" or not base.model.config.tie_word_embeddings]
    then = names[:: max(len(names) // 24, 1)]
    assert set(then) <= set(now.weights)
    old = Fingerprint(now.model_class, now.architecture, {n: now.weights[n] for n in then})
    assert not old.mismatch(now)
    assert not old.other_storage(now)
