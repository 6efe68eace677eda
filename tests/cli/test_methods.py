"""``trimtab methods``: what it says of a method is what the method is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from tests.cli.conftest import Ran
from tests.laws.cells import REFUSED, Cell, registered
from trimtab.adapt.about import about, described, first_values_of
from trimtab.adapt.contract import constant, normal, ones, zeros
from trimtab.adapt.parse import PRESETS
from trimtab.adapt.parse import methods as registry
from trimtab.models.load import load
from trimtab.models.skeleton import skeleton
from trimtab.train.recipe import Recipe
from trimtab.train.setup import resolved


@pytest.fixture(scope="module")
def model(home: Path) -> nn.Module:
    return load(home / "model", dtype="float32").model


@pytest.mark.parametrize("name", registered())
def test_each_method_says_what_it_is(name: str) -> None:
    facts = about(name)
    assert facts.title and facts.purpose and facts.example
    assert facts.source, (
        "name a paper, or say 'ours' or 'no paper', in the first line of the module"
    )
    assert re.search(r"[=⊙]", facts.formula), "give the formula as an indented block of the module"
    assert facts.edits
    assert facts.merges != bool(facts.why_not)
    assert facts.lr > 0


def test_the_list_has_every_method(run: Ran) -> None:
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    for name in registered():
        assert re.search(rf"^│ {name}\b", out, re.MULTILINE), name
    code, out, _ = run("methods", "--json")
    listed = {facts["name"]: facts for facts in json.loads(out)["methods"]}
    assert code == 0 and list(listed) == registered()
    assert listed["lora"]["merges"] and listed["lora"]["peft"] == "LORA"
    assert listed["prefix"]["edits"] == ["attention"] and not listed["prefix"]["merges"]
    for name, cls in registry.items():
        facts = listed[name]
        assert (facts["lr"], facts["weight_decay"]) == (cls.lr, cls.weight_decay)


def test_one_method_is_shown_whole(run: Ran) -> None:
    code, out, err = run("methods", "show", "bottleneck")
    assert (code, err) == (0, "")
    for text in (
        "Houlsby et al. 2019", "σ(W_down y + b_down)", "no: it passes", "0.0003", "size", "64",
        "'gelu' | 'relu'", "adapter_up.weight: N(0, std²) cut", "std = 0.001", "negative ones count",
    ):  # fmt: skip
        assert text in out, text


def test_the_size_on_a_model_is_that_of_the_attached_adapter(
    run: Ran, home: Path, model: nn.Module
) -> None:
    for text in ("lora(rank=2)", "ia3", "prefix(length=3)", "spottune(inner=lora(rank=2))"):
        adapter = tt.attach(model, text, "a")
        for source in (home / "model", home / "model" / "config.json"):
            code, out, _ = run("methods", "show", text, "--model", source, "--json")
            size = json.loads(out)["size"]
            assert code == 0 and size["parameters"] == adapter.count
            assert size["sites"] == len(adapter.sites)
        tt.detach(model, "a")
        assert size["base_parameters"] == sum(p.numel() for p in model.parameters())
    code, out, _ = run("methods", "show", "lora(rank=2)", "--model", home / "model")
    assert code == 0 and re.search(r"parameters +[\d,]+ of [\d,]+ \(\d", out) and "× " in out


def test_a_skeleton_has_no_weights(home: Path) -> None:
    assert {p.device.type for p in skeleton(home / "model").parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lorra"], "unknown method 'lorra'. Did you mean 'lora'"),
        (["lora(rnk=2)", "--model", "model"], "unknown option 'rnk'"),
        (["lora", "--model", "nowhere"], "'nowhere' is neither a folder with a config.json"),
        (["lora", "--model", "train.jsonl"], "describes no model that can be built"),
        (["full", "--model", "model"], "no targets"),
    ],
)
def test_mistakes_are_one_line(run: Ran, arguments: list[str], message: str) -> None:
    code, out, err = run("methods", "show", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['trimtab', 'methods', 'show', '--help']\n"
        "from trimtab.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('heavy', sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy []" in done.stdout


# -- defaults are used --------------------------------------------------------------------------------


def recipe(**options: object) -> Recipe:
    return Recipe.parse({"model": "model", "data": {"path": "train.jsonl"}, **options})


@pytest.mark.parametrize("name", [m for m in registered() if (m, "llama") not in REFUSED])
def test_recipes_use_the_defaults_that_are_shown(name: str, home: Path) -> None:
    base = load(home / "model", dtype="float32")
    adapter = tt.attach(base.model, Cell(name, "llama").value(), "a")
    facts = about(name)
    optim = resolved(recipe(), base, adapter, None).optim
    assert (optim.lr, optim.weight_decay) == (facts.lr, facts.weight_decay)
    own = resolved(recipe(optim={"lr": 0.5, "weight_decay": 0.25}), base, adapter, None).optim
    assert (own.lr, own.weight_decay) == (0.5, 0.25)
    assert optim.params(facts.lr).weight_decay == facts.weight_decay


@pytest.mark.parametrize("name", [m for m in registered() if (m, "llama") not in REFUSED])
def test_first_values_are_told_for_every_tensor(name: str, model: nn.Module) -> None:
    method = Cell(name, "llama").value()
    told = first_values_of(model, method)
    adapter = tt.attach(model, method, "a")
    assert told.keys() >= {tensor.slot for tensor in adapter.named()} and all(told.values())
    for tensor in adapter.named():
        value = adapter.tensors[tensor.key]
        if told[tensor.slot] in ("All zeros", "All ones"):
            assert bool((value == (told[tensor.slot] == "All ones")).all())
    tt.detach(model, "a")


def test_initial_values_in_words() -> None:
    def halves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """All one half: a test."""
        return torch.full(shape, 0.5)

    assert [described(init) for init in (zeros, ones, normal(0.5), constant(2.0))] == [
        "All zeros", "All ones", "N(0, std²), std = 0.5", "All one value, value = 2",
    ]  # fmt: skip
    assert described(halves) == "All one half"


def test_presets_are_listed_and_shown(run: Ran) -> None:
    code, out, _ = run("methods")
    for name, meaning in PRESETS.items():
        assert code == 0 and f"{name}is{meaning}".replace(" ", "") in "".join(out.split())
        fits = name if name != "compacter++" else f"{name}(size=8)"  # of a model this narrow
        code, shown, _ = run("methods", "show", fits, "--model", "model")
        assert code == 0 and "parameters" in shown
        code, shown, _ = run("methods", "show", name)
        assert code == 0 and meaning.replace(" ", "") in "".join(shown.split())
