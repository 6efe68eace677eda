"""A thousand adapters of one base: what they take in memory, and whether one more costs more than the first.

memory   in host memory, LoRA of rank 8 on queries and values in bf16: resident bytes beyond the base
load     the n-th from disk until it acts, beside PEFT's ``load_adapter``; PEFT as far as is bearable
decode   a forward that adds a token to each of some rows, whose adapters are attached, with more and more registered

python -m benchmarks many_adapters                measure all
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import core, report
from benchmarks.core import ROOT, Patience, Sample, Side, Spread
from benchmarks.many_sides import save_adapters

OURS, PEER = "trimtab", "peft"
PARTS = ("memory", "load", "decode")
SIDES = "benchmarks.many_sides"
EACH = 5
"""Loads of which a median is taken."""
NOTES = (
    "a model of the shape of SmolLM2-135M with random weights in bf16; adapters that PEFT saved in fp32, r = 8 on "
    "q_proj and v_proj, each 1.84 MB on disk and 0.92 MB in bf16",
    "load: files are in the system's cache; for Trimtab the time until the values are in host memory (read), and "
    "until the adapter is attached, for which another is taken out; PEFT keeps all that it loaded",
    "decode: each row has an adapter of its own, by the general path of mixed batches; the adapters that are "
    "registered beyond those wait on disk",
)


def memory(count: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Resident bytes of so many adapters in host memory."""
    with core.workers(
        [Side(OURS, f"{SIDES}:Held", {"sizes": dict(sizes)})], "default", 1
    ) as running:
        found = running[OURS].call("put", count)
    return {**found, "adapters": count, "beyond_base": found["after"] - found["before"]}


def load(
    folder: Path, counts: Sequence[int], bearable: int, sizes: Mapping[str, int], patience: Patience
) -> dict[str, Any]:
    """Seconds of the n-th load of either side: by turns as far as PEFT's are bearable, then ours alone."""
    options = {"folder": str(folder), "sizes": dict(sizes)}
    sides = [Side(OURS, f"{SIDES}:Ours", options), Side(PEER, f"{SIDES}:Theirs", options)]
    with core.workers(sides, "default", 1) as running:
        samples = core.take_turns(
            running, warmup=1, rounds=bearable, patience=patience,
            say=lambda s: print(f"  load {s.step + 2}, {s.side}: {s.result['load']:.3f} s", flush=True),
        )  # fmt: skip
    _same(samples)
    ours: dict[str, dict[str, Spread]] = {}
    registering: dict[int, float] = {}
    with core.workers(sides[:1], "default", 1) as running:
        for count in counts:
            registering[count] = running[OURS].call("grow", count)
            last = [count - 1 - number % count for number in range(EACH)]
            each = [running[OURS].call("cold", number) for number in last]
            ours[str(count)] = {part: Spread.of(e[part] for e in each) for part in ("load", "read")}
    peft = {str(n): Spread.of(_around(samples, n)) for n in counts if 1 < n <= bearable}
    return {
        "ours": ours,
        "peft": peft,
        "bearable": bearable,
        "faster": core.ratio(samples, PEER, OURS, lambda s: s.result["load"]),
        "registering": registering[counts[-1]],
        "samples": samples,
    }


def _around(samples: Sequence[Sample], number: int) -> list[float]:
    """PEFT's loads up to the n-th."""
    found = [s.result["load"] for s in samples if s.side == PEER]  # the first of them is the second
    return found[max(0, number - 1 - EACH) : number - 1]


def _same(samples: Sequence[Sample]) -> None:
    """Both sides' n-th adapter says the same."""
    for step in {sample.step for sample in samples}:
        said = [sample.result["said"] for sample in samples if sample.step == step]
        if not max(said) - min(said) < 1e-2 * max(said):
            raise core.SideError(f"the sides compute different things at step {step}: {said}")


def decode(
    folder: Path,
    counts: Sequence[int],
    rows: int,
    past: int,
    steps: int,
    threads: int,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Seconds of a forward with so many registered, ``rows`` of them attached."""
    found: dict[str, Spread] = {}
    for count in counts:
        active = min(rows, count)
        options = {"folder": str(folder), "sizes": dict(sizes), "active": active}
        with core.workers([Side(OURS, f"{SIDES}:Ours", options)], "default", threads) as running:
            running[OURS].call("grow", count)
            seconds = running[OURS].call("decode", active, past, steps + 2)
        found[str(count)] = Spread.of(seconds[2:])
        print(f"  decode, {count} registered: {found[str(count)].text(1, 1e3)} ms", flush=True)
    return {"rows": rows, "past": past, "seconds": found}


def tables(found: Mapping[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    lines: list[str] = []
    if part := found.get("memory"):
        lines += [
            "## In host memory", "",
            f"{part['adapters']:,} adapters: {part['beyond_base'] / 1e6:,.1f} MB resident beyond the base, of which "
            f"{part['values'] / 1e6:,.1f} MB are their values.", "",
        ]  # fmt: skip
    if part := found.get("load"):
        lines += [
            "## The n-th load from disk, ms", "",
            "| n | Trimtab, read | until it acts | PEFT |", "|---|---|---|---|",
        ]  # fmt: skip
        for number, ours in part["ours"].items():
            theirs = part["peft"].get(number)
            told = "" if theirs is None else theirs.text(0, 1e3)
            lines.append(
                f"| {number} | {ours['read'].text(1, 1e3)} | {ours['load'].text(1, 1e3)} | {told} |"
            )
        lines += [
            "", f"Over {part['bearable']} loads by turns: **{part['faster'].text(1)} times as fast**. Registering "
            f"one looks into it whole: {1e3 * part['registering']:.1f} ms.", "",
        ]  # fmt: skip
    if part := found.get("decode"):
        lines += [
            f"## A token for each of {part['rows']} rows, ms", "",
            f"After {part['past']} tokens; each row has an adapter of its own, and with fewer there are fewer rows.",
            "", "| registered | ms |", "|---|---|",
        ]  # fmt: skip
        lines += [f"| {n} | {spread.text(1, 1e3)} |" for n, spread in part["seconds"].items()]
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure and write the report. Raises `SideError` where the sides compute different things."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks many_adapters", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--bearable", type=int, default=100, help="loads of PEFT's")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=0)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="folder")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model, to try the benchmark itself"
    )
    options = parser.parse_args(argv)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64} if options.tiny else {}  # fmt: skip
    counts = sorted(options.counts)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_adapters(folder, max(*counts, options.bearable, options.rows) + EACH + 2, small)
        if "memory" in options.parts:
            found["memory"] = memory(counts[-1], small)
        if "load" in options.parts:
            patience = Patience(quiet=1.1, seconds=options.patience)
            found["load"] = load(folder, counts, options.bearable, small, patience)
        if "decode" in options.parts:
            found["decode"] = decode(
                folder, counts, options.rows, options.past, options.steps, options.threads, small
            )
    write(Path(options.out), vars(options), found)
    return 0


def write(folder: Path, about: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """``many_adapters.json`` and ``many_adapters.md``; a part that was not measured now stays as it was."""
    file = folder / "many_adapters.json"
    before = json.loads(file.read_text("utf-8"))["parts"] if file.is_file() else {}
    place, commit = report.machine(), report.commit()
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    now = {name: {**part, "of": f"{date}, commit {commit}"} for name, part in found.items()}
    every = core.spreads(before) | now
    found = {name: every[name] for name in PARTS if name in every}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in report.PACKAGES)
    head = f"{place['cpu']}, {place['cores']} cores, {place['memory_gb']} GB; {versions}. "
    head += "Medians (least … most). Made by `python -m benchmarks many_adapters`."
    notes = [f"- {note}" for note in NOTES]
    lines = [
        line
        for name, part in found.items()
        for line in (*tables({name: part}), "", f"{part['of']}.", "")
    ]
    text = "\n".join(["# A thousand adapters of one base", "", head, "", *lines, "", *notes, ""])
    work = {key: value for key, value in about.items() if key != "out"}
    whole = {
        "benchmark": "many_adapters",
        "machine": place,
        "work": work,
        "parts": dict(found),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "many_adapters.json").write_text(
        json.dumps(whole, indent=1, default=report._plain) + "\n", "utf-8"
    )
    (folder / "many_adapters.md").write_text(text, encoding="utf-8")
    print(text)
