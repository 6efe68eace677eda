"""The loop: early stopping, the best checkpoint, averages, feeding from anywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import trimtab as tt
from tests.data.kit import write_jsonl
from tests.train import kit
from tests.train.kit import go
from trimtab.adapt.adapter import Adapter
from trimtab.engine import Engine
from trimtab.errors import ConfigError, DataError
from trimtab.models.load import load
from trimtab.train.events import Event, read_events

OVERFIT = {"steps": 60, "eval__every": 5, "optim__lr": 0.1, "optim__schedule": "constant"}


def events_of(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def losses_of(folder: Path) -> dict[int, float]:
    """Held-out losses of the adapter by step."""
    found = [event for event in events_of(folder, "eval") if event["of"] == "adapter"]
    return {event["step"]: event["loss"]["value"] for event in found}


def saved(folder: Path, step: int) -> Adapter:
    return Adapter.load(folder / "checkpoints" / f"step-{step:06d}" / "adapter")


def test_it_stops_early_and_keeps_the_best(home: Path) -> None:
    # Held out are the opposite answers: soon learning makes it worse.
    flipped = {"yes": "no", "no": "yes"}
    held = [{**row, "completion": flipped[row["completion"]]} for row in kit.rows(8, seed=1)]
    write_jsonl(home / "held.jsonl", held)
    options = {**OVERFIT, "steps": 200, "eval__patience": 3, "checkpoint__final": "best"}
    done = go(kit.recipe(home, "early", **options))
    losses = losses_of(done.folder)
    best = min(losses, key=lambda step: losses[step])
    assert done.status == "finished"
    assert done.steps == best + 15
    assert events_of(done.folder, "stop")[0]["best"] == best
    assert events_of(done.folder, "end")[0]["adapter_step"] == best
    result = Adapter.load(done.folder / "adapter")
    assert result.origin.provenance["step"] == best
    assert result == saved(done.folder, best)
    assert done.after is not None
    assert done.after.held_out.loss.value == losses[best]
    again = go(kit.recipe(home, "early", **options), resume=True)  # a run that is over stays over
    assert again.steps == done.steps
    assert Adapter.load(done.folder / "adapter") == result


def test_a_gain_must_be_large_enough(home: Path) -> None:
    done = go(kit.recipe(home, "strict", **OVERFIT, eval__patience=2, eval__min_gain=100.0))
    assert done.steps == 15  # the first measurement counts, then two that are not better by so much


def test_the_last_state_is_kept_by_default(home: Path) -> None:
    done = go(kit.recipe(home, "last", **OVERFIT))
    assert Adapter.load(done.folder / "adapter") == saved(done.folder, 60)
    losses = losses_of(done.folder)
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name[5:]) for path in (done.folder / "checkpoints").iterdir()}
    assert best in kept


def test_the_average_is_measured_and_saved_beside_the_tensors(home: Path) -> None:
    plain = go(kit.recipe(home, "plain", steps=20))
    done = go(kit.recipe(home, "averaged", steps=20, optim__ema=0.9))
    last = saved(done.folder, 20)
    assert last == saved(plain.folder, 20)  # training itself is the same
    result = Adapter.load(done.folder / "adapter")
    assert result != last
    base = load(home / "model", dtype="float32")
    tt.attach(base.model, result)
    engine = Engine(base)
    other = load(home / "model", dtype="float32")
    state = Engine(other)
    state.load(done.folder / "checkpoints" / "step-000020", "default")
    with state.averaged("default"):
        for key, tensor in tt.attach(load(home / "model").model, result).tensors.items():
            assert torch.equal(tensor, dict(state._tenant("default").adam.named)[key])
    assert engine.context("default") == state.context("default")


def test_answers_in_the_middle_of_a_run(home: Path) -> None:
    done = go(kit.recipe(home, "midway", eval__metric="choice", eval__midway="answers"))
    middle = [event for event in events_of(done.folder, "eval") if event["of"] == "adapter"][:-1]
    assert [event["step"] for event in middle] == [4, 8]
    assert all(event["answers"] and event["samples"] for event in middle)


def test_rows_of_python_and_of_datasets(home: Path) -> None:
    rows = kit.rows(12)
    base = load(home / "model", dtype="float32")
    adapter = tt.attach(base.model, tt.LoRA(rank=2), "a")
    out = home / "rows"
    done = tt.train(base, adapter, rows, held_out=kit.rows(4, seed=1), out=out, quiet=True)
    assert done.steps == 1
    start = events_of(out, "start")[0]
    assert (start["data"]["examples"], start["held_out"]) == (12, 4)
    frame = datasets.Dataset.from_list(rows)
    other = tt.attach(base.model, tt.LoRA(rank=2), "b")
    tt.train(base, other, frame, out=home / "frame", quiet=True)
    losses = [events_of(home / name, "step")[0]["loss"] for name in ("rows", "frame")]
    assert losses[0] == losses[1]


def test_a_stream_of_datasets(home: Path) -> None:
    given = kit.rows(40)

    def rows() -> Any:
        yield from given

    stream = datasets.IterableDataset.from_generator(rows)
    base = load(home / "model", dtype="float32")
    adapter = tt.attach(base.model, tt.LoRA(rank=2), "a")
    options = {"data.stream": True, "batch.size": 8}
    out = home / "streamed"
    done = tt.train(base, adapter, stream, steps=7, out=out, options=options, quiet=True)
    assert done.steps == 7
    assert [event["epoch"] for event in events_of(out, "step")] == [0] * 5 + [1] * 2


def test_mixes_duplicates_and_leaks_are_said(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held = kit.rows(12), kit.rows(3, seed=1)
    write_jsonl(home / "dirty.jsonl", [*train, train[0], held[0]])
    write_jsonl(home / "held.jsonl", held)
    write_jsonl(home / "more.jsonl", kit.rows(6, seed=2))
    options = {
        "data__path": str(home / "dirty.jsonl"), "steps": 2, "eval__every": None,
        "data__mix": [{"path": str(home / "more.jsonl"), "weight": 2.0}],
    }  # fmt: skip
    from trimtab.train.api import train_recipe

    train_recipe(kit.recipe(home, "dirty", **options))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 examples occur more than once" in said
    assert "1 held-out examples are trained on as well" in said
    assert "an epoch is 54% dirty.jsonl (14 × 1), 46% more.jsonl (6 × 2)." in said
    train_recipe(kit.recipe(home, "clean", **options, data__duplicates="drop"))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 duplicates and 1 examples that are held out were dropped." in said
    assert "trained on as well" not in said
    assert "50% dirty.jsonl (12 × 1), 50% more.jsonl (6 × 2)." in said


def test_user_functions_and_columns(home: Path) -> None:
    rows = [
        {"q": row["prompt"], "a": row["completion"], "id": number}
        for number, row in enumerate(kit.rows(12))
    ]
    write_jsonl(home / "qa.jsonl", rows)
    (home / "mine.py").write_text(
        "def louder(row):\n    return {**row, 'prompt': row['prompt'].upper()}\n\n"
        "def short(row):\n    return 'not' not in row['prompt']\n"
    )
    done = go(
        kit.recipe(
            home, "mapped", data__path=str(home / "qa.jsonl"), data__held_out=None, eval__every=None,
            data__columns={"prompt": "q", "completion": "a"}, data__map=f"{home / 'mine.py'}:louder",
            data__filter=f"{home / 'mine.py'}:short",
        )
    )  # fmt: skip
    start = events_of(done.folder, "start")[0]
    assert "left out by your filter" in start["data"]["notes"][0]
    assert start["data"]["examples"] < 12
    assert all(
        prompt.isupper() for prompt in re.findall("user\n(.*?) 0<", "".join(start["previews"]))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__stream": True}, "the length of a stream is not known; set steps"),
        ({"data__stream": True, "steps": 3, "data__duplicates": "drop"}, "duplicates: drop"),
        ({"eval__every": None, "eval__patience": 2}, "set every as well"),
        ({"data__held_out": None, "checkpoint__final": "best"}, "need held-out data"),
        ({"data__weight": 0}, "data.weight"),
    ],
)
def test_options_that_do_not_go_together(home: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kit.recipe(home, "x", **options)


def test_a_budget_below_the_longest_example(home: Path) -> None:
    with pytest.raises(DataError, match=r"more than a step may have \(20\); raise batch.tokens"):
        go(kit.recipe(home, "x", batch={"tokens": 20}))
