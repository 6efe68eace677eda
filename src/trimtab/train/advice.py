"""Sentences about a run, each of them true by its numbers: the gap, forgetting, and what to do next."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from trimtab.evals.intervals import Interval
from trimtab.train.summary import Metric, RunSummary

MOST = 5
CLEAR = 0.02
"""A loss that differs by less than this share is not called higher or lower."""


def gap_sentence(run: RunSummary) -> str:
    """What the gap between training and held-out loss means; empty where there is none to speak of."""
    train, gap = run.training_loss(), run.gap
    if train is None or gap is None or run.after is None or run.best is None:
        return ""
    held = Interval(**run.after["loss"])
    if turned(run):
        return (
            f"Held-out loss was lowest at step {run.best['step']} ({run.best['loss']['value']:.3f}) and rose to "
            f"{held.value:.3f}, while training loss went on falling to {train.value:.3f}: "
            f"{_noise(run, 'a sign of over-fitting, though with n = {} the two intervals overlap') or 'it over-fits'}."
        )
    if held.low <= train.value <= held.high:
        return "Training loss lies inside the interval of the held-out loss: no over-fitting can be seen."
    if gap < 0:
        return (
            "Held-out loss is below training loss: no over-fitting. (Training loss is measured before each step, "
            "and with dropout where there is some.)"
        )
    if _rise(run) <= 0:
        return (
            "Training loss is lower, as it is on examples that were seen; held-out loss was at its lowest at the end, "
            "so training has not gone on for too long."
        )
    return (
        f"Training loss is lower, as it is on examples that were seen; held-out loss was lowest at step "
        f"{run.best['step']} and has hardly changed since."
    )


def turned(run: RunSummary) -> bool:
    """Whether held-out loss rose clearly after its best step while training loss fell clearly."""
    if run.best is None:
        return False
    then, now = run.training_loss(until=run.best["step"]), run.training_loss()
    if then is None or now is None:
        return False
    return _rise(run) > CLEAR and now.value < (1 - CLEAR) * then.value


def forgetting_sentence(run: RunSummary) -> str:
    """Whether the unrelated text became harder to predict; empty where it was not measured."""
    change = run.forgotten
    if change is None:
        return ""
    value, low, high = (
        100 * math.expm1(min(x, 500.0)) for x in (change.value, change.low, change.high)
    )
    measured = f"{value:+.1f} % (95 % interval {low:+.1f} % to {high:+.1f} %)"
    if change.low <= 0 <= change.high:
        return f"Perplexity changed by {measured}: no forgetting that this text could show."
    if change.high < 0:
        return f"Perplexity changed by {measured}: this text became easier, nothing was forgotten."
    words = "a little" if value < 5 else "clearly" if value < 20 else "much"
    return f"Perplexity changed by {measured}: the model predicts general text {words} worse than before."


def advice(run: RunSummary) -> list[str]:
    """At most a few remarks, the most important first."""
    found = (remark for rule in RULES for remark in rule(run))
    return [remark for remark, _ in zip(found, range(MOST), strict=False)]


# -- rules -----------------------------------------------------------------------------------------


def _not_learning(run: RunSummary) -> Iterator[str]:
    losses = [loss for _, loss in run.curve("loss")]
    tenth = max(len(losses) // 10, 1)
    if len(losses) < 10:
        return
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last >= first:
        yield (
            f"Training loss did not fall ({first:.3f} at first, {last:.3f} at the end): try another learning rate "
            "(a lower one if the curve jumps), and look at the trained tokens below."
        )


def _held_out(run: RunSummary) -> Iterator[str]:
    if not run.start["held_out"]:
        yield (
            "Nothing was held out, so nothing here says how well the adapter does on new examples: name a file as "
            "data.held_out, or set data.fraction=0.1."
        )
    for text in _noted(run, "careful"):
        if found := re.match(r"([\d,]+) held-out examples are trained on", text):
            yield (
                f"{found[1]} held-out examples are trained on as well, so the held-out numbers look better than they "
                "are: take those out of one of the files."
            )


def _best_step(run: RunSummary) -> Iterator[str]:
    if run.best is None or run.after is None or len(run.measured) < 2:
        return
    step, rise = run.best["step"], _rise(run)
    if rise > CLEAR:
        yield (
            f"Held-out loss was lowest at step {step} of {run.last}, and {100 * rise:.0f} % higher at the end"
            f"{_noise(run, ' (with n = {} this can be chance)')}: train less (steps={step}), or stop early."
        )
    elif rise <= 0:
        earlier = float(run.measured[-2]["loss"]["value"])
        fall = 1 - run.after["loss"]["value"] / earlier if earlier > 0 else 0.0
        if fall > CLEAR:
            since = run.measured[-2]["step"]
            yield (
                f"Held-out loss was still falling at the end ({100 * fall:.0f} % lower than at step {since}): more "
                "training may help."
            )


def _no_gain(run: RunSummary) -> Iterator[str]:
    before, after = (None if e is None else Interval(**e["loss"]) for e in (run.before, run.after))
    if before is not None and after is not None and after.low > before.high:
        yield (
            f"Held-out loss is higher than before training ({after.value:.3f} against {before.value:.3f}): try a lower "
            "learning rate or fewer steps."
        )
    answers = (run.after or {}).get("answers")
    if answers and answers["interval"]["low"] <= answers["majority"]:
        yield (
            f"Answers right ({answers['interval']['value']:.3f}) are not clearly above always answering "
            f"“{answers['commonest']}” ({answers['majority']:.3f})."
        )


def _too_few(run: RunSummary) -> Iterator[str]:
    known = run.change is not None and not run.change.low <= 0 <= run.change.high
    for metric in run.metrics[:1]:
        if metric.name == "held-out loss" and known:
            continue  # compared example by example they differ
        needed = examples_needed(metric)
        if needed and metric.after:
            yield (
                f"The intervals of {metric.name} before and after overlap with n = {metric.after.count}: if the "
                f"difference is real, about {needed:,} held-out examples would show it."
            )


def _lost(run: RunSummary) -> Iterator[str]:
    for text in _noted(run, "data"):
        name = text.partition(" (")[0]
        read, dropped, cut = (
            int(found[1].replace(",", "")) if (found := re.search(pattern, text)) else 0
            for pattern in (r"([\d,]+) rows of", r"([\d,]+) dropped", r"([\d,]+) of them cut")
        )
        if read and dropped / read >= 0.01:
            yield f"{100 * dropped / read:.0f} % of the rows of {name} ({dropped:,} of {read:,}) were dropped."
        if read and cut / read >= 0.01:
            yield (
                f"{100 * cut / read:.0f} % of the rows of {name} ({cut:,} of {read:,}) were cut; a larger "
                "data.max_tokens keeps more of them, as far as the model's context goes."
            )


def _forgot(run: RunSummary) -> Iterator[str]:
    change = run.forgotten
    if change is not None and change.low > 0 and math.expm1(change.value) >= 0.05:
        yield (
            f"An unrelated text became {100 * math.expm1(min(change.value, 500.0)):.0f} % more surprising to the "
            "model. If that matters: a lower learning rate, fewer steps or fewer trained parameters forget less."
        )


RULES: tuple[Callable[[RunSummary], Iterator[str]], ...] = (
    _not_learning, _held_out, _best_step, _no_gain, _too_few, _lost, _forgot
)  # fmt: skip


def examples_needed(metric: Metric) -> int:
    """How many examples would part two overlapping intervals, since their widths go with 1/√n; 0: no telling."""
    one, two = metric.before, metric.after
    if one is None or two is None or one.apart(two) or one.value == two.value or not two.count:
        return 0
    lower, upper = (one, two) if one.value < two.value else (two, one)
    reach = (lower.high - lower.value) + (upper.value - upper.low)
    exact = round(two.count * (reach / (upper.value - lower.value)) ** 2, 6)
    digits = max(len(str(math.ceil(exact))) - 2, 0)
    return 0 if exact > 1e6 else math.ceil(exact / 10**digits) * 10**digits


def _rise(run: RunSummary) -> float:
    """By what share held-out loss at the end is above its best."""
    if run.best is None or run.after is None or run.best["loss"]["value"] <= 0:
        return 0.0
    return float(run.after["loss"]["value"] / run.best["loss"]["value"] - 1)


def _noise(run: RunSummary, words: str) -> str:
    """What to add where the intervals of the best and the last held-out loss overlap."""
    if run.best is None or run.after is None:
        return ""
    best, last = Interval(**run.best["loss"]), Interval(**run.after["loss"])
    return "" if best.apart(last) else words.format(last.count)


def _noted(run: RunSummary, name: str) -> list[str]:
    """What the plan says under a name."""
    rows: list[Any] = run.start["plan"]
    return [str(text) for key, text in rows if key == name]
