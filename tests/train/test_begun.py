"""Runs whose method begins from data: the first training examples are what it sees."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests.train import kit
from tests.train.kit import at_step, go
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.context import IGNORED
from trimtab.errors import AttachError
from trimtab.models.load import load
from trimtab.train.plan import plan
from trimtab.train.recipe_file import read_recipe
from trimtab.train.setup import opened_base
from trimtab.train.shown import shown_batches
from trimtab.train.sources import read_sources

EVA = {"kind": "lora", "rank": 2, "init": "eva"}


def test_what_is_shown_is_the_training_data(home: Path) -> None:
    recipe = kit.recipe(home, "run")
    base = load(recipe.model, dtype="float32")
    batches = list(shown_batches(recipe, base))
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 8]
    examples = read_sources(recipe, base.tokenizer, None).sample
    for row, example in enumerate(examples[:8]):
        batch = {name: tensor[row] for name, tensor in batches[0].items()}
        length = int(batch["attention_mask"].sum())
        assert batch["input_ids"][:length].tolist() == [*example.tokens, example.targets[-1]]
        learnt = [t for t, w in zip(example.targets, example.weights, strict=True) if w]
        assert batch["labels"][batch["labels"] != IGNORED].tolist() == learnt
        # the first label, shifted, is at the first position with a weight
        assert int((batch["labels"] != IGNORED).nonzero()[0]) == example.prompt


@pytest.mark.parametrize("method", [EVA, {"kind": "lora", "rank": 2, "init": "lora-ga"}, "fish"])
def test_it_trains_resumes_and_its_recipe_runs_again(home: Path, method: object) -> None:
    method = {"kind": method, "share": 0.05} if isinstance(method, str) else method
    straight = go(kit.recipe(home, "straight", method=method, eval__every=None))
    with at_step(5, lambda run: signal.raise_signal(signal.SIGINT)):
        stopped = go(kit.recipe(home, "stopped", method=method, eval__every=None))
    assert stopped.status == "interrupted"
    resumed = go(kit.recipe(home, "stopped", method=method, eval__every=None), resume=True)
    first, second = (Adapter.load(one.folder / "adapter") for one in (straight, resumed))
    assert first == second
    assert straight.after is not None and straight.before is not None
    assert straight.after.held_out.loss.value < straight.before.held_out.loss.value
    # the recipe that the run left says what data decided, and decides the same again
    again = read_recipe(straight.folder / "recipe.yaml")
    _, _, adapter = opened_base(again)
    assert adapter.method.to_dict() == dict(again.method)


def test_a_plan_is_made_of_it(home: Path) -> None:
    recipe = kit.recipe(home, "run", method=EVA)
    shown = dict(plan(recipe).rows)["method"]
    assert "eva" in shown


def test_without_data_it_says_what_to_pass(home: Path) -> None:
    base = load(str(home / "model"), dtype="float32")
    with pytest.raises(AttachError, match="pass batches to attach"):
        tt.attach(base.model, tt.LoRA(rank=2, init="eva"), "a")
    assert not any(isinstance(m, torch.nn.Dropout) and m.training for m in base.model.modules())
