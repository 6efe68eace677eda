"""Variants that are trained together are the runs that they are alone; losers are stopped and the best is kept."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.kit import write_jsonl
from tests.train import kit
from trimtab.adapt.adapter import Adapter
from trimtab.engine import Engine
from trimtab.errors import ConfigError, FileFormatError, TrainingError, UnknownNameError
from trimtab.train.events import Event, read_events
from trimtab.train.recipe_file import make_recipe
from trimtab.train.sweep.api import sweep_recipe
from trimtab.train.sweep.config import SweepConfig
from trimtab.train.sweep.record import Asked, Record
from trimtab.train.sweep.summary import SweepSummary
from trimtab.train.sweep.sweep import SweepOutcome

PLAIN = {"kind": "lora", "rank": 2}
"""Nothing is drawn while it is trained."""


def values_of(home: Path, **options: Any) -> dict[str, Any]:
    """A recipe's values without a folder; 12 steps unless told otherwise."""
    chosen = {"method": PLAIN, "eval__forgetting": False, "eval__samples": 0, **options}
    values = kit.recipe(home, "unused", **chosen).model_dump(mode="json")
    return {key: value for key, value in values.items() if key != "out"}


def sweep(
    home: Path,
    options: dict[str, Any],
    *,
    out: str = "sweep",
    resume: bool = False,
    config: dict[str, Any] | None = None,
    **recipe: Any,
) -> SweepOutcome:
    asked = Asked(values_of(home, **recipe), options, SweepConfig(**(config or {})))
    return sweep_recipe(asked, out=home / out, resume=resume, quiet=True)


def alone(home: Path, folder: str, choice: dict[str, Any], **recipe: Any) -> Path:
    values = {**values_of(home, **recipe), "out": str(home / folder)}
    kit.go(make_recipe(values, choice))
    return home / folder


def events_of(folder: Path, kind: str) -> list[Event]:
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == kind]


def losses_of(folder: Path) -> dict[int, float]:
    found = [event for event in events_of(folder, "eval") if event["of"] == "adapter"]
    return {event["step"]: event["loss"]["value"] for event in found}


def variant(folder: Path, number: int) -> Path:
    return folder / "variants" / f"{number:03d}"


def assert_alike(one: Path, other: Path) -> None:
    """The same run up to rounding: its steps, its measurements, its adapter."""
    first, second = (kit.steps_of(folder) for folder in (one, other))
    assert [step for step, *_ in first] == [step for step, *_ in second]
    for (_, loss, norm), (_, loss_2, norm_2) in zip(first, second, strict=True):
        assert loss == pytest.approx(loss_2, rel=1e-5)
        assert norm == pytest.approx(norm_2, rel=1e-3)
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-5)
    tensors, others = (Adapter.load(folder / "adapter").tensors for folder in (one, other))
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=2e-5)


def assert_same(one: Path, other: Path, number: int) -> None:
    """The same run, bit for bit."""
    first, second = (variant(folder, number) for folder in (one, other))
    assert kit.steps_of(first) == kit.steps_of(second)
    assert losses_of(first) == losses_of(second)
    if (second / "adapter").exists():
        assert Adapter.load(first / "adapter") == Adapter.load(second / "adapter")


# -- together and alone ------------------------------------------------------------------------------


def test_each_variant_is_the_run_that_it_is_alone(home: Path) -> None:
    """Other methods, losses, seeds and batches (so other numbers of steps) beside each other."""
    methods = ["lora(rank=2)", "ia3", "prefix(length=2)"]
    options = {"method": methods, "loss.label_smoothing": [0.0, 0.1], "optim.lr": 1e-2}
    done = sweep(home, options, config={"eta": 1}, steps=8)
    assert done.status == "finished"
    assert [entry.status for entry in done.entries] == ["finished"] * 6
    options = {"batch.size": [4, 6], "seed": [0, 5]}
    more = sweep(home, options, out="more", config={"eta": 1}, epochs=1)
    assert {entry.total for entry in more.entries} == {6, 4}
    for of, number in ((done, 0), (done, 5), (more, 3)):
        choice = {"optim.lr": 1e-2, **of.entries[number].choice}
        more_options = {"steps": 8} if of is done else {"epochs": 1, "optim__lr": 5e-3}
        if of is more:
            del choice["optim.lr"]
        own = alone(home, f"{of.folder.name}{number}", choice, **more_options)
        assert_alike(variant(of.folder, number), own)


def test_steps_are_one_forward_and_backward(home: Path) -> None:
    groups: list[int] = []
    original = Engine.forward_backward

    def counted(self: Engine, data: Any, adapter: Any, *losses: Any) -> Any:
        groups.append(len(set(adapter)))
        return original(self, data, adapter, *losses)

    options = {"optim.lr": [1e-3, 2e-3], "loss.z_loss": [0.0, 1e-3]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward_backward", counted)
        sweep(home, options, config={"eta": 1}, steps=3)
    assert groups == [4, 4, 4]


def test_what_a_variant_draws_does_not_depend_on_the_others(home: Path) -> None:
    one = sweep(home, {"seed": [3, 4]}, config={"eta": 1}, method=DRAWS, steps=6)
    two = sweep(home, {"seed": [3, 5]}, config={"eta": 1}, method=DRAWS, steps=6, out="two")
    assert_alike(variant(one.folder, 0), variant(two.folder, 0))
    assert kit.steps_of(variant(one.folder, 1)) != kit.steps_of(variant(two.folder, 1))


# -- who goes on -------------------------------------------------------------------------------------


def test_losers_are_stopped_and_the_winner_is_kept(home: Path) -> None:
    rates = [1e-6, 1e-2, 1e-5, 3e-3]
    done = sweep(home, {"optim.lr": rates}, eval__every=None)
    taken = [len(kit.steps_of(variant(done.folder, n))) for n in range(4)]
    assert sorted(taken) == [3, 3, 6, 12]
    judged = {n: losses_of(variant(done.folder, n)) for n in range(4)}
    early = sorted(range(4), key=lambda n: judged[n][3])
    assert sorted(n for n in range(4) if taken[n] == 3) == sorted(early[2:])
    late = sorted(early[:2], key=lambda n: judged[n][6])
    assert [taken[n] for n in late] == [12, 6]
    assert done.winner is not None and done.winner.number == late[0]
    assert done.winner.loss == judged[late[0]][12]
    whole = alone(home, "whole", done.winner.choice, eval__every=None)
    kept, own = (Adapter.load(folder / "adapter").tensors for folder in (done.folder, whole))
    for key, tensor in kept.items():
        torch.testing.assert_close(tensor, own[key], rtol=1e-3, atol=2e-5)
    assert (done.folder / "recipe.yaml").read_text() == (
        variant(done.folder, late[0]) / "recipe.yaml"
    ).read_text()
    found = SweepSummary.read(done.folder)
    assert [line.entry.number for line in found.lines] == [*late, *early[2:]]
    assert [line.how.split(":")[0] for line in found.lines] == ["winner"] + ["stopped"] * 3
    assert found.lines[0].loss.startswith(f"{done.winner.loss:.4f} [")
    page = (done.folder / "report.html").read_text()
    assert f"The best is optim.lr={rates[late[0]]:g}" in page
    assert page.count("<polyline") == 8  # a curve of each loss for each variant
    stopped = variant(done.folder, early[3])  # a variant that lost is a run, which goes on alone
    recipe = make_recipe(json.loads(json.dumps(_yaml(stopped / "recipe.yaml"))))
    assert kit.go(recipe, resume=True).steps == 12


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def test_a_decision_does_not_count_as_a_measurement_of_the_run(home: Path) -> None:
    """Early stopping counts the measurements that the recipe asks for."""
    options = {"eval__every": 5, "eval__patience": 1, "steps": 16, "optim__lr": 1e-9}
    done = sweep(home, {"optim.beta1": [0.8, 0.9]}, **options)
    own = alone(home, "own", done.entries[0].choice, **options)
    assert done.winner is not None
    assert len(kit.steps_of(variant(done.folder, done.winner.number))) == len(kit.steps_of(own))


def test_a_variant_whose_loss_is_not_finite_fails_and_the_others_go_on(home: Path) -> None:
    done = sweep(home, {"optim.lr": [1e-3, 1e30, 3e-3]}, config={"eta": 1})
    assert [entry.status for entry in done.entries] == ["finished", "failed", "finished"]
    assert "not finite" in done.entries[1].why and "train.jsonl:" in done.entries[1].why
    assert events_of(variant(done.folder, 1), "error")
    own = alone(home, "own", done.entries[2].choice)
    assert_alike(variant(done.folder, 2), own)
    with pytest.raises(TrainingError, match="all 2 variants failed"):
        sweep(home, {"optim.lr": [1e29, 1e30]}, out="none")
    assert SweepSummary.read(home / "none").winner is None


def test_rounds_of_a_few_at_once(home: Path) -> None:
    rates = [1e-6, 3e-3, 1e-2]
    done = sweep(home, {"optim.lr": rates}, config={"together": 2, "eta": 1}, steps=4)
    assert [entry.round for entry in done.entries] == [0, 0, 1]
    assert all(entry.status == "finished" for entry in done.entries)
    assert done.winner == min(done.entries, key=lambda entry: entry.loss or math.inf)
    sweep(home, {"optim.lr": rates}, config={"together": 2, "eta": 1}, steps=4, resume=True)


# -- interrupted -------------------------------------------------------------------------------------

DRAWS = {"kind": "lora", "rank": 2, "dropout": 0.2}
RATES = {"optim.lr": [1e-3, 1e-2], "batch.size": [4, 5]}


def test_an_interrupted_sweep_ends_bitwise_where_another_does(home: Path) -> None:
    whole = sweep(home, RATES, method=DRAWS)
    with kit.at_joined_step(5, lambda: signal.raise_signal(signal.SIGINT)):
        stopped = sweep(home, RATES, out="broken", method=DRAWS)
    assert (stopped.status, stopped.winner) == ("interrupted", None)
    done = sweep(home, RATES, out="broken", method=DRAWS, resume=True)
    assert done.entries == whole.entries
    for entry in whole.entries:
        assert_same(done.folder, whole.folder, entry.number)
    assert Adapter.load(done.folder / "adapter") == Adapter.load(whole.folder / "adapter")
    again = sweep(home, RATES, out="broken", method=DRAWS, resume=True)  # it stays finished
    assert (again.entries, again.winner) == (whole.entries, whole.winner)


def test_a_killed_sweep_ends_bitwise_where_another_does(home: Path) -> None:
    options = {"method": DRAWS, "checkpoint__final": "best", "eval__patience": 2}
    whole = sweep(home, RATES, **options)
    killed = 0
    for moment in range(4):
        events = variant(home / "killed", moment % 3) / "events.jsonl"
        grown = (events, 3 + 2 * moment)
        killed += kit.killed_after(
            0.005 * moment,
            lambda: sweep(home, RATES, out="killed", resume=True, **options),
            grown=grown,
        )
    assert killed >= 2
    lines = (variant(home / "killed", 0) / "events.jsonl").read_text(errors="replace").splitlines()
    resumed = {line for line in lines if '"event": "resume"' in line}
    assert any('"step": 0' not in line for line in resumed)  # and not only from the beginning
    done = sweep(home, RATES, out="killed", resume=True, **options)
    assert done.entries == whole.entries
    for entry in whole.entries:
        assert_same(done.folder, whole.folder, entry.number)


def test_another_sweep_does_not_go_on(home: Path) -> None:
    done = sweep(home, {"optim.lr": [1e-3, 1e-2]}, steps=2)
    with pytest.raises(ConfigError, match="choose another 'out'"):
        sweep(home, {"optim.lr": [1e-3, 1e-2]}, steps=2)
    with pytest.raises(ConfigError, match="options differ"):
        sweep(home, {"optim.lr": [1e-3, 2e-2]}, steps=2, resume=True)
    with pytest.raises(ConfigError, match="config differ"):
        sweep(home, {"optim.lr": [1e-3, 1e-2]}, steps=2, resume=True, config={"eta": 3})
    assert Record.read(done.folder).winner is not None


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optim.lr": []}, "empty list"),
        ({"optim.lr": [1e-3]}, "one value"),
        ({"optim.lr": [1e-3, 0.001]}, "lists 0.001 twice"),
        ({"optim.lr": 1e-3}, "nothing varies"),
        ({"optim.lr": "log(1e-5,1e-3)"}, "range.*--random"),
        ({"optim.lr": "log(0,1)"}, "above 0"),
        ({"optim.lr": "uniform(1,1)"}, "below the second"),
        ({"method.rank": "int(1.5,4)"}, "whole numbers"),
        ({"optim.lrr": [1, 2]}, "Did you mean 'lr'"),
        ({"optim.lr": ["fast", 1e-3]}, "optim.lr.*valid number"),
        ({"method.rank": [2, 0]}, "rank"),
        ({"method": ["lora(rank=2)", "lora(rank=2, alpha=32)"]}, "the same run"),
        ({"dtype": ["float32", "float64"]}, "cannot vary dtype.*base"),
        ({"memory.recompute": ["none", "mlp"]}, "cannot vary memory"),
        ({"batch.micro_tokens": [64, 128]}, r"cannot vary batch\.micro_tokens"),
        ({"eval.every": [2, 3]}, "cannot vary eval"),
        ({"name": ["a", "b"]}, "cannot vary name"),
        ({"data.held_out": None, "optim.lr": [1e-3, 1e-2], "eval.every": None}, "held-out"),
        (
            {"data.instruction": None, "data.train": ["completion", "all"]},
            "other held-out examples",
        ),
    ],
)
def test_what_is_no_sweep_is_told_before_it_starts(
    home: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        sweep(home, options)
    assert not (home / "sweep" / "variants").exists()


def test_a_list_as_a_value_and_other_data(home: Path) -> None:
    write_jsonl(home / "more.jsonl", kit.rows(8, seed=3))
    targets = {"method.targets": [["q_proj"], ["q_proj", "v_proj"]], "method.layers": [[0, 1]]}
    paths = {"data.path": [str(home / "train.jsonl"), str(home / "more.jsonl")]}
    done = sweep(home, {**targets, **paths}, steps=2, config={"eta": 1})
    sites = [len(Adapter.load(variant(done.folder, n) / "adapter").sites) for n in range(4)]
    assert sites == [2, 2, 4, 4]
    names = [events_of(variant(done.folder, n), "start")[0]["data"]["name"] for n in range(2)]
    assert [Path(name).name for name in names] == ["train.jsonl", "more.jsonl"]


def test_more_than_the_memory_holds_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train import facts

    monkeypatch.setattr(facts, "whole_memory", lambda device: 300_000)
    with pytest.raises(
        ConfigError, match=r"training \d of 2 variants .* beside it, of 293 KiB on cpu"
    ):
        sweep(home, {"optim.lr": [1e-3, 1e-2]})


def test_an_unknown_sampler_and_a_tracker_of_one_run(home: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'random'"):
        sweep(home, {"optim.lr": [1e-3, 1e-2]}, config={"sampler": "randomm", "count": 2})
    with pytest.raises(ConfigError, match="one run at a time"):
        sweep(home, {"optim.lr": [1e-3, 1e-2]}, track=["wandb"])


def test_what_is_wrong_in_a_later_round_is_told_before_the_first(home: Path) -> None:
    with pytest.raises(ConfigError, match="variant method=ia4: .*Did you mean"):
        sweep(home, {"method": ["ia3", "lora", "ia4"]}, config={"together": 1})
    assert not (home / "sweep").exists()


def test_a_run_is_no_sweep_to_go_on_with(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(FileFormatError, match="holds no sweep"):
        sweep(home, {"optim.lr": [1e-3, 1e-2]}, out="run", resume=True)
    (home / "new").mkdir()
    (home / "new" / ".sweep.json").write_text("{")  # killed while it was written
    assert sweep(home, {"optim.lr": [1e-3, 1e-2]}, out="new", resume=True, steps=1).winner
