"""A whole run: what it leaves, and that stopping it in any way loses nothing."""

from __future__ import annotations

import math
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trimtab as tt
from tests.train import kit
from tests.train.kit import at_step, go, steps_of
from trimtab.adapt.adapter import Adapter
from trimtab.engine import Engine
from trimtab.errors import ConfigError, DataError, NonFiniteLossError, StorageError, TargetError
from trimtab.evals import held_out
from trimtab.models.load import load
from trimtab.train.api import train_recipe
from trimtab.train.events import read_events
from trimtab.train.run import Outcome, Run
from trimtab.train.sources import read_sources

SPOTTUNE = {"kind": "spottune", "inner": "lora(rank=2)"}


@pytest.fixture(scope="module")
def straight(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return go(kit.recipe(job, "unused", out=str(out), eval__metric="choice"))


def test_what_a_run_leaves(straight: Outcome, job: Path) -> None:
    folder = straight.folder
    assert (straight.status, straight.steps) == ("finished", 12)
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml", "events.jsonl", "checkpoints", "adapter", "report.html"
    }  # fmt: skip
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["method"]["kind"] == "lora"
    assert recipe["optim"]["lr"] == 5e-3
    steps = steps_of(folder)
    assert [step for step, _, _ in steps] == list(range(1, 13))
    assert steps[-1][1] < steps[0][1] - 0.5
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    best = min(
        (
            e
            for e in read_events(folder / "events.jsonl")
            if e["event"] == "eval" and e["of"] == "adapter"
        ),
        key=lambda e: e["loss"]["value"],
    )
    assert set(names) == {"step-000009", "step-000012", f"step-{best['step']:06d}"}
    assert straight.before is not None
    assert straight.after is not None
    assert straight.after.held_out.loss.high < straight.before.held_out.loss.low
    assert straight.after.answers is not None


def test_the_saved_adapter_measures_the_same_to_the_last_digit(
    straight: Outcome, job: Path
) -> None:
    assert straight.after is not None
    base = load(job / "model", dtype="float32")
    saved = Adapter.load(straight.folder / "adapter")
    assert saved.origin.provenance["step"] == 12
    assert saved.origin.provenance["metrics"]["loss"]["value"] == straight.after.held_out.loss.value
    tt.attach(base.model, saved)
    engine = Engine(base)
    sources = read_sources(kit.recipe(job, "x"), base.tokenizer, engine.context("default"))
    assert held_out(engine, sources.held_out, "default") == straight.after.held_out


def test_the_report_stands_alone(straight: Outcome) -> None:
    page = (straight.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)
    for text in (
        "Before and after",
        "<svg",
        "<mark>",
        "majority class",
        "sha256",
        "torch",
        "prefers-color-scheme",
    ):
        assert text in page, text
    assert page.count("<section") == page.count("</section>")


@pytest.mark.parametrize("method", ["lora", SPOTTUNE])
def test_an_interrupted_run_resumes_bitwise(home: Path, straight: Outcome, method: Any) -> None:
    options = {} if method == "lora" else {"method": method}
    whole = straight if method == "lora" else go(kit.recipe(home, "whole", **options))
    recipe = kit.recipe(home, "broken", **options)
    before = signal.getsignal(signal.SIGINT)
    for step in (5, 8):
        with at_step(step, lambda run: signal.raise_signal(signal.SIGINT)):
            stopped = go(recipe, resume=step > 5)
        assert (stopped.status, stopped.steps) == ("interrupted", step)
        assert "Not finished" in (stopped.folder / "report.html").read_text()
    assert signal.getsignal(signal.SIGINT) is before
    done = go(recipe, resume=True)
    assert done.status == "finished"
    assert Adapter.load(done.folder / "adapter") == Adapter.load(whole.folder / "adapter")
    assert steps_of(done.folder) == steps_of(whole.folder)
    assert go(recipe, resume=True).steps == 12  # a finished run stays finished


def test_a_full_disk_stops_the_run_and_loses_nothing(home: Path, straight: Outcome) -> None:
    recipe = kit.recipe(home, "full", eval__every=None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            at_step(5, lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))),
            pytest.raises(StorageError, match=r"step 7: .*step-000003"),
        ):
            go(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = home / "full"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000003"]
    done = go(recipe, resume=True)
    assert Adapter.load(done.folder / "adapter") == Adapter.load(straight.folder / "adapter")


def test_a_loss_that_is_not_finite_stops_the_run(home: Path) -> None:
    def poison(run: Run) -> None:
        with torch.no_grad():
            run.base.model.model.embed_tokens.weight.fill_(math.nan)

    with at_step(5, poison), pytest.raises(NonFiniteLossError) as caught:
        go(kit.recipe(home, "nan", eval__every=None))
    message = str(caught.value)
    assert "step 5" in message
    assert "train.jsonl:" in message
    assert "step-000003" in message
    Adapter.load(home / "nan" / "checkpoints" / "step-000003" / "adapter")
    last = read_events(home / "nan" / "events.jsonl")[-1]
    assert last["event"] == "error"
    assert "train.jsonl:" in last["message"]


# -- bad input -------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(straight: Outcome, job: Path) -> None:
    out = {"out": str(straight.folder)}
    with pytest.raises(ConfigError, match="choose another 'out', or resume"):
        go(kit.recipe(job, "x", **out))
    with pytest.raises(ConfigError, match=r"optim\.lr differ from its recipe"):
        go(kit.recipe(job, "x", **out, optim__lr=1e-3), resume=True)
    with pytest.raises(ConfigError, match="name its folder"):
        go(kit.recipe(job, "x", out=None), resume=True)


def test_resuming_over_other_data_is_refused(home: Path) -> None:
    recipe = kit.recipe(home, "run", eval__every=None, steps=4)
    go(recipe)
    kit.data_file(home / "train.jsonl", 24, seed=9)
    with pytest.raises(DataError, match="cannot resume: the content of train.jsonl"):
        go(recipe.replace(steps=4), resume=True)


def test_a_site_that_is_never_reached(home: Path) -> None:
    base = load(home / "model", dtype="float32")
    base.model.model.unused = torch.nn.Linear(64, 64)
    adapter = tt.attach(base.model, tt.LoRA(rank=2, targets=("q_proj", "unused")), name="a")
    with pytest.raises(TargetError, match=r"1 of 3 sites .* never reached .*model\.unused"):
        tt.train(base, adapter, data=home / "train.jsonl", out=home / "run", quiet=True)
    assert not (home / "run").exists()


def test_overlap_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = kit.recipe(
        home, "run", data__held_out=str(home / "train.jsonl"), steps=1, eval__samples=0
    )
    train_recipe(recipe)
    shown = capsys.readouterr().out
    assert "24 held-out examples are trained on as well" in shown
    assert "⟦yes<|im_end|>⟧" in shown or "⟦no<|im_end|>⟧" in shown
    assert "parameters" in shown


# -- the library -----------------------------------------------------------------------------------


def test_the_lines_of_the_design(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    base = tt.load("model")
    support = tt.attach(base.model, tt.LoRA(rank=2), name="support")
    outcome = tt.train(base, support, data="train.jsonl", epochs=1, quiet=True)
    assert outcome.folder == Path("runs/train-lora-1")
    assert outcome.before is None
    support.save("adapters/support")
    assert Adapter.load("adapters/support") == Adapter.load(outcome.folder / "adapter")
    again = tt.train(
        base, support, data="train.jsonl", steps=2, options={"batch.tokens": 100}, quiet=True
    )
    assert again.folder == Path("runs/train-lora-2")
    assert again.steps == 2


def test_a_run_shares_out_the_ranks_of_adalora(home: Path) -> None:
    """The schedule is run by the trainer, which knows the steps; what is left is a LoRA."""
    method = {"kind": "adalora", "rank": 3, "target_rank": 1, "tinit": 2, "tfinal": 4}
    options = {"steps": 10, "eval__every": None, "checkpoint__every": 10, "checkpoint__bits": 8}
    outcome = go(kit.recipe(home, "run", method=method, **options))
    assert outcome.status == "finished"
    whole = Adapter.load(outcome.folder / "checkpoints" / "step-000010" / "adapter")
    singular = [t for key, t in whole.tensors.items() if key.endswith("lora_E")]
    left = [int((e != 0).sum()) for e in singular]
    assert sum(left) == len(singular) < 3 * len(singular)
    shared = Adapter.load(outcome.folder / "adapter")
    ranks = [t.shape[0] for key, t in shared.tensors.items() if key.endswith("lora_A.weight")]
    assert shared.origin.provenance["rounded"]["bits"] == 8
    assert shared.method.kind == "lora" and ranks == [max(rank, 1) for rank in left]
