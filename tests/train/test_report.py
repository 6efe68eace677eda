"""The report: what it shows of a run, and that each sentence of advice is true by the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.train.events_kit import evaluation, interval, sample, unrelated, write_run
from trimtab.data.examples import ExampleConfig, Outcomes
from trimtab.evals.intervals import Interval, wilson
from trimtab.train.advice import advice, examples_needed, forgetting_sentence, gap_sentence
from trimtab.train.report import write_report
from trimtab.train.summary import Metric, RunSummary

FALLING = [2.0 * 0.97**step for step in range(100)]


def summary(folder: Path, *arguments: Any, **options: Any) -> RunSummary:
    return RunSummary.read(write_run(folder / "run", *arguments, **options))


def evals(*pairs: tuple[int, float]) -> list[tuple[str, dict[str, Any]]]:
    return [("eval", evaluation(step, loss)) for step, loss in pairs]


# -- numbers ---------------------------------------------------------------------------------------


def test_the_gap_is_held_out_loss_above_the_last_tenth_of_training(tmp_path: Path) -> None:
    run = summary(tmp_path, FALLING, *evals((0, 2.0), (100, 0.5)))
    train = run.training_loss()
    assert train is not None
    assert train.value == pytest.approx(sum(FALLING[-10:]) / 10)
    assert train.count == 10
    assert run.gap == pytest.approx(0.5 - train.value)
    earlier = run.training_loss(until=50)
    assert earlier is not None
    assert earlier.value == pytest.approx(sum(FALLING[40:50]) / 10)
    assert run.speed_curve == [(step, 200.0) for step in range(1, 101)]


def test_forgetting_is_paired(tmp_path: Path) -> None:
    old, new = [20.0, 35.0, 50.0], [21.0, 36.0, 51.0]
    run = summary(
        tmp_path, FALLING, ("forgetting", unrelated(0, old)), ("forgetting", unrelated(100, new))
    )
    assert run.forgotten is not None
    assert run.forgotten.value == pytest.approx(0.1)
    assert run.forgotten.high == pytest.approx(0.1)
    percent = 100 * (math.e**0.1 - 1)
    assert f"+{percent:.1f} %" in forgetting_sentence(run)
    assert "clearly worse" in forgetting_sentence(run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([0.0, 0.3, -0.3], "no forgetting that this text could show"),
        ([-0.2, -0.3, -0.2], "easier, nothing was forgotten"),
        ([0.2, 0.3, 0.2], "a little worse"),
        ([4.0, 5.0, 4.0], "much worse"),
    ],
)
def test_forgetting_in_words(tmp_path: Path, change: list[float], words: str) -> None:
    old = [20.0, 35.0, 50.0]
    new = [a + b for a, b in zip(old, change, strict=True)]
    both = [("forgetting", unrelated(0, old)), ("forgetting", unrelated(100, new))]
    assert words in forgetting_sentence(summary(tmp_path, FALLING, *both))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (
            ((0, 2.0), (40, 0.6), (100, 0.9)),
            "was lowest at step 40 (0.600) and rose to 0.900, while",
        ),
        (((0, 2.0), (40, 0.6), (100, 0.65)), "a sign of over-fitting, though with n = 40"),
        (((0, 2.0), (40, 0.6), (100, 0.5)), "at its lowest at the end"),
        (((0, 2.0), (40, 0.6), (100, 0.605)), "lowest at step 40 and has hardly changed"),
        (((0, 2.0), (40, 0.6), (100, 0.12)), "no over-fitting can be seen"),
        (((0, 2.0), (40, 0.6), (100, 0.02)), "Held-out loss is below training loss"),
    ],
)
def test_the_gap_in_words(tmp_path: Path, held: Any, words: str) -> None:
    assert words in gap_sentence(summary(tmp_path, FALLING, *evals(*held)))


# -- advice ----------------------------------------------------------------------------------------


def test_train_less(tmp_path: Path) -> None:
    (remark,) = advice(summary(tmp_path, FALLING, *evals((0, 2.0), (40, 0.6), (100, 0.9))))
    assert remark == (
        "Held-out loss was lowest at step 40 of 100, and 50 % higher at the end: "
        "train less (steps=40), or stop early."
    )


def test_train_longer(tmp_path: Path) -> None:
    (remark,) = advice(summary(tmp_path, FALLING, *evals((0, 2.0), (40, 0.6), (100, 0.3))))
    assert "still falling at the end (50 % lower than at step 40)" in remark


def test_nothing_learnt_and_worse_than_before(tmp_path: Path) -> None:
    found = advice(summary(tmp_path, FALLING[::-1], *evals((0, 1.0), (100, 1.5))))
    assert "Training loss did not fall (0.113 at first" in found[0]
    assert "higher than before training (1.500 against 1.000)" in found[1]


def test_nothing_held_out(tmp_path: Path) -> None:
    (remark,) = advice(summary(tmp_path, FALLING, begin={"held_out": 0}))
    assert "Nothing was held out" in remark


def test_losses_of_data_are_read_from_the_plans_own_words(tmp_path: Path) -> None:
    outcomes = Outcomes(ExampleConfig(context=64, too_long="left"), read=1200, used=900)
    outcomes.truncated, outcomes.lost_tokens = 300, 5000
    outcomes.dropped["malformed"] = 300
    plan = [
        ["data", f"d.jsonl (CSV (commas): a, b): {outcomes}"],
        ["careful", "3 held-out examples are trained on as well"],
    ]
    found = advice(summary(tmp_path, FALLING, *evals((0, 2.0), (100, 0.5)), begin={"plan": plan}))
    assert "3 held-out examples are trained on as well" in found[0]
    assert found[1] == "25 % of the rows of d.jsonl (300 of 1,200) were dropped."
    assert "25 % of the rows of d.jsonl (300 of 1,200) were cut" in found[2]


def test_answers_no_better_than_the_majority_and_too_few_examples(tmp_path: Path) -> None:
    def answers(value: float) -> dict[str, Any]:
        return {
            "interval": interval(value, 0.15), "majority": 0.5, "commonest": "yes", "unreadable": 0
        }  # fmt: skip

    found = advice(
        summary(
            tmp_path,
            FALLING,
            ("eval", evaluation(0, 2.0, answers=answers(0.5))),
            ("eval", evaluation(100, 0.5, answers=answers(0.6))),
        )
    )
    assert "Answers right (0.600) are not clearly above always answering “yes” (0.500)." in found
    # Half-widths of 0.15 meet in a difference of 0.1 when they are a third: nine times the examples.
    assert any(
        "n = 40: if the difference is real, about 360 held-out" in remark for remark in found
    )


def test_about_as_many_examples_would_indeed_part_the_intervals() -> None:
    needed = examples_needed(Metric("a", "", wilson(24, 50), wilson(30, 50)))

    def parted(count: int) -> bool:
        return wilson(round(0.48 * count), count).apart(wilson(round(0.6 * count), count))

    assert parted(round(1.1 * needed))
    assert not parted(round(0.8 * needed))
    one = Interval(0.1, 0.0, 0.2, 9)
    assert examples_needed(Metric("a", "", one, one)) == 0
    assert examples_needed(Metric("a", "", None, one)) == 0
    far = Interval(0.5, 0.49, 0.51, 9)
    assert examples_needed(Metric("a", "", one, far)) == 0


# -- the page --------------------------------------------------------------------------------------


def test_everything_that_was_measured_is_shown(tmp_path: Path) -> None:
    metrics = {"rouge-L": interval(0.25), "chrF": interval(31.5)}
    folder = write_run(
        tmp_path / "run",
        FALLING,
        ("eval", evaluation(0, 2.0, samples=[sample("no", correct=False)])),
        ("eval", evaluation(40, 0.6, samples=[sample("perhaps")])),
        ("eval", evaluation(100, 0.5, metrics=metrics, samples=[sample("yes", correct=True)])),
        ("forgetting", unrelated(0, [20.0, 35.0])),
        ("forgetting", unrelated(100, [21.0, 36.0])),
    )
    page = write_report(folder).read_text()
    for text in (
        "rouge-L", "31.50", "step 40", "perhaps", "base, wrong", "adapter, right", "Is &lt;it&gt;?",
        "Gradient norm", "Tokens a second", "Learning rate", "Forgetting", "general.txt", "<h2>Advice</h2>",
        "100 rows read: 100 used.", "<mark>yes</mark> &amp; &lt;b&gt;", "1.00 GiB",
    ):  # fmt: skip
        assert text in page, text
    assert page.index("rouge-L") < page.index("held-out loss<")  # what people came for is first


def test_runs_of_the_first_version_still_have_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FALLING, *evals((0, 2.0), (100, 0.5)))
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    lines[0].pop("held_out_sha256")
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = write_report(folder).read_text()
    assert "Forgetting" not in page
    assert "held-out loss" in page


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun(tmp_path: Path, steps: int) -> None:
    losses: list[Any] = ["nan"] * steps
    folder = write_run(tmp_path / "run", losses, finished=False)
    page = write_report(folder).read_text()
    assert f"stopped after step {steps}" in page
    assert "No step has been taken." in page
