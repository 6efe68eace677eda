"""Bases in few bits on the command line: asked for, or as the adapter knows them; and merging into few bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trimtab as tt
from tests.cli.conftest import Ran
from tests.laws.cells import shaken
from trimtab.frozen.lowbit import LowBitLinear


@pytest.fixture(scope="module")
def adapters(home: Path) -> Path:
    """One adapter trained beside a base in NF4, one beside a dense one."""
    for name, storage in (("packed", "nf4"), ("plain", None)):
        base = tt.load(home / "model", dtype="float32", storage=storage)
        shaken(tt.attach(base.model, "lora(rank=2)", name), 0.05).save(home / name)
    return home


def kinds(folder: Path) -> set[str]:
    base = tt.load(folder, dtype="float32")
    return {m.kind for m in base.model.modules() if isinstance(m, LowBitLinear)}


def test_the_base_is_loaded_as_the_adapter_knows_it(run: Ran, adapters: Path) -> None:
    generate = ["generate", "--model", "model", "--max-tokens", "3", "sea"]
    code, answer, err = run(*generate, "--adapter", "packed")
    assert (code, err) == (
        0,
        "The base is loaded in nf4, as 'packed' was trained beside it; --storage dense loads it densely.\n",
    )
    code, same, err = run(*generate, "--adapter", "packed", "--storage", "nf4")
    assert (code, same, err) == (0, answer, "")
    code, _, err = run(*generate, "--adapter", "packed", "--storage", "dense")
    assert code == 0
    assert "careful: adapter 'packed' was trained beside this base in another storage" in err
    assert run(*generate, "--adapter", "plain")[2] == ""
    assert "here linear layers are in int8" in run(*generate, "-a", "plain", "--storage", "int8")[2]


def test_every_command_that_loads_a_base_takes_a_storage(run: Ran, adapters: Path) -> None:
    code, _, err = run("eval", "-m", "model", "-a", "packed", "-d", "held.jsonl", "--no-base")
    assert code == 0
    assert "loaded in nf4" in err
    options = ["--storage", "nf4", "--exempt", "down_proj=int8", "--average-bits", "6"]
    code, _, err = run("eval", "-m", "model", "-d", "held.jsonl", *options)
    assert code == 0
    assert "layers in int8, 5." in err
    code, out, err = run(
        "chat", "-m", "model", "-a", "packed", "--max-tokens", "3", lines="hello\n"
    )
    assert code == 0
    assert "loaded in nf4" in err
    code, out, _ = run("plan", "-m", "model", "-d", "train.jsonl", *options, "--json")
    assert code == 0
    assert json.loads(out)["trained"] > 0
    code, out, _ = run("inspect", "packed")
    assert code == 0
    assert "nf4, but for lm_head" in out
    code, _, err = run("generate", "-m", "model", "sea", "--storage", "nf5")
    assert code == 2
    assert "unknown storage 'nf5'. Did you mean 'nf4'" in err


def test_a_run_keeps_its_storage(run: Ran, adapters: Path) -> None:
    given = ["--model", "model", "--data", "train.jsonl", "--held-out", "held.jsonl", "steps=1"]
    budget = ["--storage", "nf4", "--average-bits", "6"]
    code, out, _ = run("train", *given, *budget, "--out", "mixed")
    assert code == 0
    assert "linear layers in nf4" in out
    assert "14 layers in int8" in out
    code, _, err = run("eval", "mixed")
    assert code == 0
    assert "layers in int8" in err
    assert "careful" not in err
    code, _, err = run("generate", "-m", "model", "-a", "mixed", "sea", "--max-tokens", "2")
    assert code == 0
    assert "loaded in nf4" in err
    assert "careful" not in err
    code, _, err = run("train", *given, "average_bits=5")
    assert code == 2
    assert "set storage" in err


def test_a_run_from_a_base_at_hand_notes_its_storage(adapters: Path, tmp_path: Path) -> None:
    base = tt.load(adapters / "model", dtype="float32", storage="nf4", exempt=["up_proj=int8"])
    adapter = tt.attach(base.model, "lora(rank=2)", "a")
    data = adapters / "train.jsonl"
    tt.train(base, adapter, data, steps=1, out=tmp_path / "run", quiet=True)
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "storage: nf4" in text
    assert "up_proj=int8" in text


def test_merging_tells_what_it_costs(run: Ran, adapters: Path) -> None:
    code, out, err = run("merge", "model", "packed", "m-dense")
    assert code == 0
    assert "loaded in nf4" in err
    assert out.startswith("merged packed into model: m-dense\n  14 layers in float32\n")
    assert not kinds(adapters / "m-dense")
    code, _, err = run(
        "merge", "model", "packed", "m-base", "--into", "base", "--tolerance", "0.001"
    )
    assert code == 2
    assert "of what the adapter does to the outputs" in err
    assert not (adapters / "m-base").exists()
    code, out, _ = run("merge", "model", "packed", "m-base", "--into", "base", "--force")
    assert code == 0
    assert "14 layers in nf4" in out
    assert "of what the adapter does" in out
    assert kinds(adapters / "m-base") == {"nf4"}
    code, out, _ = run("merge", "model", "plain", "m-int8", "--into", "int8", "--force")
    assert code == 0
    assert kinds(adapters / "m-int8") == {"int8"}
    code, _, err = run("merge", "model", "plain", "other", "--into", "int9")
    assert code == 2
    assert "unknown storage 'int9'" in err
    code, out, _ = run("merge", "model", "plain", "m-bf16", "--dtype", "bfloat16")
    assert code == 0
    assert "14 layers in bfloat16" in out
    assert json.loads((adapters / "m-bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_that_is_in_few_bits_where_it_lies(run: Ran, adapters: Path) -> None:
    """Its storage is not asked for a second time; asking for the same is no error, for another is."""
    run("merge", "model", "packed", "m-nf4", "--into", "base", "--force")
    base = tt.load(adapters / "m-nf4", dtype="float32")
    shaken(tt.attach(base.model, "lora(rank=2)", "more"), 0.05).save(adapters / "more")
    code, _, err = run("generate", "-m", "m-nf4", "-a", "more", "sea", "--max-tokens", "2")
    assert (code, err) == (0, "")
    ask = ["generate", "-m", "m-nf4", "sea", "--max-tokens", "2", "--storage"]
    assert run(*ask, "nf4")[0] == 0
    code, _, err = run(*ask, "int8")
    assert code == 2
    assert "is stored in few bits already" in err
    again = tt.load(adapters / "m-nf4", dtype="float32")
    with torch.no_grad():
        ids = torch.arange(4, 20)[None]
        tt.attach(again.model, tt.Adapter.load(adapters / "more"))
        assert torch.equal(again.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
