"""The results of `benchmarks.methods` as Markdown and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.methods_benches import FULL
from benchmarks.scatter import Mark, scatter
from trimtab.evals.intervals import Interval, wilson

Entry = dict[str, Any]


def best_rate(runs: Sequence[Entry]) -> float | None:
    """The factor whose run with seed 0 has the lowest loss on the rows for choosing."""
    known = [run for run in runs if run["seed"] == 0 and "choosing_loss" in run]
    finite = [run for run in known if math.isfinite(run["choosing_loss"])]
    return min(finite, key=lambda run: run["choosing_loss"])["factor"] if finite else None


def line(run: Entry) -> str:
    """One run, for the terminal."""
    head = f"{run['bench']}: {run['name']}, rate ×{run['factor']:.3g}, seed {run['seed']}"
    for kind in ("error", "crash"):
        if kind in run:
            return f"{head}: {run[kind]}"
    return f"{head}: accuracy {run['accuracy']['value']:.3f}, loss {run['loss']['value']:.4f}"


def names_of(runs: Sequence[Entry]) -> list[str]:
    """The methods, in the order of their first runs."""
    return list(dict.fromkeys(run["name"] for run in runs))


def rows_of(found: Entry) -> list[Entry]:
    """A row for each method that ran: its best rate, all seeds together; best accuracy first."""
    rows = []
    for name in names_of(found["runs"]):
        own = [run for run in found["runs"] if run["name"] == name]
        factor = best_rate(own)
        chosen = [run for run in own if run["factor"] == factor and "accuracy" in run]
        if factor is not None and chosen:
            row = _row(name, factor, chosen, found["settings"]["factors"])
            rows.append({**row, "speed": speed_of(found, name)})
    return sorted(rows, key=lambda row: (-row["accuracy"].value, row["trained"]))


def speed_of(found: Entry, name: str) -> tuple[float, float] | None:
    """Median training tokens per second, and their ratio to those of full fine-tuning."""
    rates = found.get("speed", {})
    if name not in rates or FULL not in rates:
        return None
    ratios = [own / full for own, full in zip(rates[name], rates[FULL], strict=True)]
    return median(rates[name]), median(ratios)


def _row(name: str, factor: float, runs: Sequence[Entry], factors: Sequence[float]) -> Entry:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    shares = [run["accuracy"]["value"] for run in runs]
    count = runs[0]["accuracy"]["count"]
    ends = {min(factors): ", lowest", max(factors): ", highest"}
    return {
        "name": name,
        "lr": runs[0]["lr"],
        "rate": f"{runs[0]['lr']:.2g} (×{factor:.2g}{ends.get(factor, '')})",
        "seeds": len(runs),
        # of as many rows as there are, not of rows times seeds: the rows are the same ones
        "accuracy": wilson(round(mean(shares) * count), count),
        "apart": max(shares) - min(shares),
        "loss": mean([run["loss"]["value"] for run in runs]),
        "gap": mean([run["loss"]["value"] - run["training_loss"] for run in runs]),
        "peak": max(run["peak_bytes"] for run in runs),
        "drift": mean([run["drift"] for run in runs]) if "drift" in runs[0] else None,
        "forgetting": {
            of: mean([run["forgetting"][of] for run in runs]) for of in runs[0]["forgetting"]
        },
        **{key: runs[0][key] for key in ("method", "trained", "share", "bytes")},
    }


def failures(found: Entry) -> list[tuple[str, str]]:
    """(method, why) of those that never ran, each once."""
    ran = {row["name"] for row in rows_of(found)}
    said = {run["name"]: run.get("error") or run.get("crash") for run in found["runs"]}
    return [(name, str(why)) for name, why in said.items() if name not in ran]


def section(found: Entry) -> list[str]:
    """One bench, as Markdown."""
    settings, rows = found["settings"], rows_of(found)
    learn, choose, report = settings["rows"]
    factors = ", ".join(f"{factor:.2g}" for factor in settings["factors"])
    drifts = any(row["drift"] is not None for row in rows)
    commits = sorted({run["commit"] for run in found["runs"]})
    unrelated = (
        "Unrelated text: mean cosine between its sentence embeddings with and without the adapter (1: unchanged); "
        "a classifier predicts no text, so it has no perplexity."
        if drifts
        else "Unrelated text: its perplexity before → after."
    )
    lines = [
        f"## {settings['title']}",
        "",
        f"{settings['what']}: {learn} rows to learn from, {choose} to choose the learning rate by, {report} to report "
        f"on; {settings['recipe']['dtype']} base, {found['machine']['cpu']}, {found['machine']['cores']} cores; "
        f"commits {', '.join(commits)}. Learning rates: each method's default × {factors}, the same number for all; a "
        "best one at an end of these is marked. Accuracy: mean of the seeds, with the 95 % interval over the rows; "
        "gap: loss on the reported rows less training loss at the end; tokens/s: in training, in brackets beside full "
        "fine-tuning. " + unrelated,
        "",
        f"![accuracy by trained parameters](methods-{settings['name']}.svg)",
        "",
        "| method | accuracy (95 %) | between seeds | loss | gap | trained | of the model | file | tokens/s "
        "| peak memory | unrelated text | learning rate |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows]
    failed = failures(found)
    if failed:
        lines += ["", "Not run:", "", *(f"- {name}: {_plain(why)}" for name, why in failed)]
    return [*lines, ""]


def _line(row: Entry) -> str:
    accuracy: Interval = row["accuracy"]
    known = f"{accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]"
    apart = f"{row['apart']:.3f}" if row["seeds"] > 1 else "–"
    speed = "{:,.0f} (×{:.2f})".format(*row["speed"]) if row["speed"] else "–"
    return (
        f"| {row['name']} | {known} | {apart} | {row['loss']:.4f} | {row['gap']:+.4f} | {row['trained']:,} "
        f"| {row['share']:.3%} | {row['bytes'] / 2**20:.2f} MiB | {speed} | {row['peak'] / 2**30:.2f} GiB "
        f"| {_unrelated(row)} | {row['rate']} |"
    )


def _unrelated(row: Entry) -> str:
    if row["drift"] is not None:
        return f"{row['drift']:.3f}"
    if not row["forgetting"]:
        return "–"
    before, after = (math.exp(min(row["forgetting"][of], 500)) for of in ("base", "adapter"))
    return f"{before:.2f} → {after:.2f}"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def picture(found: Entry) -> str:
    """Accuracy by trained parameters; the area of a mark is the size of the file."""
    marks = [
        Mark(
            row["name"], max(row["trained"], 1), row["accuracy"].value, row["accuracy"].low, row["accuracy"].high,
            30 + 10 * math.log2(1 + row["bytes"] / 2**20),
        )
        for row in rows_of(found)
    ]  # fmt: skip
    return scatter(
        marks,
        above=f"{found['settings']['title']}: share of rows judged right, with 95 % intervals",
        below="trained parameters; larger marks have larger files",
        size=(960, 640),
        room=150,
    )


def write(folder: Path, found: dict[str, Entry]) -> None:
    """``methods.md`` and a picture for each bench that has a row."""
    lines = ["# Every method, side by side", "", "Made by `python -m benchmarks methods`.", ""]
    for name, bench in found.items():
        lines += section(bench)
        if rows_of(bench):
            (folder / f"methods-{name}.svg").write_text(picture(bench), encoding="utf-8")
    text = "\n".join(lines)
    (folder / "methods.md").write_text(text, encoding="utf-8")
    print(text)
