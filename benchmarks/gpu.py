"""A LoRA step at the shape of Llama-3-8B on one CUDA device, beside peft: one call, no network, no file of weights.

    python -m benchmarks gpu                  (under ten minutes on an H200)
    python -m benchmarks gpu --tiny           two layers on the CPU, to see that all of it runs
    python -m benchmarks gpu --sides trimtab "peft, blocks recomputed"

bf16, rank 16 on all linear layers, rows of 4,096 random tokens. First each kernel is compared with its plain twin, on
the device, at the shapes of the model. Then the sides take their steps one after another, each in a process of its own
that has the device's memory for itself, and measures the device's best product after its steps. Weights are random and
made on the device, the same ones on all sides; what runs out of memory is a row that says so. Attention is torch's
fused one on all sides: its plain one is switched off.

    trimtab   the engine's verbs; everything kept, or blocks recomputed
    nf4       the same on a base in NF4, unpacked by our own kernel (by plain torch where there is none), and, where it
              is installed, by bitsandbytes
    peft      what its user writes: autocast, model(ids, labels=ids).loss, AdamW, with and without checkpointing; QLoRA
              where bitsandbytes is installed

Results are written after each side, so that what was measured stays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from benchmarks import core
from benchmarks.bars import bars
from benchmarks.core import Side, SideError, Spread
from benchmarks.gpu_sides import LLAMA, TINY
from benchmarks.report import commit, machine

OURS = "trimtab"
LOSS_TOLERANCE = 0.02
SPEED, MEMORY, STORED = 16_000, 30.0, 0.12
"""Targets: tokens/s and GB of our side with everything kept; how far QLoRA may lie behind it."""
NF4 = "trimtab, NF4"
SIDES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    OURS: ("Trimtab", {}),
    "trimtab, blocks recomputed": ("Trimtab", {"recompute": True}),
    "peft": ("Peft", {}),
    "peft, blocks recomputed": ("Peft", {"recompute": True}),
    NF4: ("Trimtab", {"storage": "nf4", "plain": True}),
    "trimtab, NF4, bitsandbytes": ("Trimtab", {"storage": "nf4"}),
    "peft, NF4, bitsandbytes": ("Peft", {"storage": "nf4"}),
    "peft, NF4, bitsandbytes, blocks recomputed": ("Peft", {"storage": "nf4", "recompute": True}),
}
"""By name: the class in `benchmarks.gpu_sides`, and its options."""


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one side: what it found, or why it found nothing."""
    kind, own = SIDES[name]
    given = {"shape": TINY if options.tiny else LLAMA, "device": "cpu" if options.tiny else "cuda"}
    given |= {key: getattr(options, key) for key in ("rows", "tokens", "rank")}
    side = Side(name, f"benchmarks.gpu_sides:{kind}", {**given, **own})
    try:
        with core.workers([side], "default", options.threads) as running:
            return dict(running[name].call("run", options.warmup, options.steps))
    except SideError as error:
        return {"failed": str(error).strip().splitlines()[-1][:300]}


def proofs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each kernel beside its plain twin, in a process of its own."""
    given = {"device": "cpu" if options.tiny else "cuda", "shape": TINY if options.tiny else LLAMA}
    side = Side("kernels", "benchmarks.gpu_proofs:Kernels", given)
    with core.workers([side], "default", options.threads) as running:
        return list(running["kernels"].call("prove", options.tokens, 2 if options.tiny else 20))


def chosen(asked: Sequence[str] | None) -> list[str]:
    """The sides to measure: those asked for, or all that can be."""
    if asked:
        return list(asked)
    there = util.find_spec("bitsandbytes") is not None
    return [name for name in SIDES if there or "bitsandbytes" not in name]


# -- the report --------------------------------------------------------------------------------------


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens/s, share of the best product and GB of a side that ran."""
    rate = Spread.of(row["units"] / seconds for seconds in row["seconds"])
    share = 4 * row["P"] * rate.median / row["peak_operations"]
    memory = {key: row[key] / 1e9 for key in ("allocated", "reserved")}
    return {"rate": rate, "share": share, **memory}


def verdicts(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The targets, and what came of them."""
    done = {name: figures(row) for name, row in rows.items() if "seconds" in row}
    parts = []
    if OURS in done:
        rate, memory = done[OURS]["rate"].median, done[OURS]["allocated"]
        parts.append(f"- at least {SPEED:,} tokens/s: {_met(rate >= SPEED)} ({rate:,.0f})")
        parts.append(f"- at most {MEMORY:.0f} GB: {_met(memory <= MEMORY)} ({memory:.1f})")
        for name in (NF4, f"{NF4}, bitsandbytes"):
            if name in done:
                ratio = done[name]["rate"].median / rate
                parts.append(
                    f"- {name} within {STORED:.0%} of it: {_met(ratio >= 1 - STORED)} ({ratio:.2f} of its rate)"
                )
        if "peft" in done:
            faster = rate / done["peft"]["rate"].median
            less = memory / done["peft"]["allocated"]
            parts.append(f"- beside peft: {faster:.2f} × its rate, {less:.2f} × its memory")
    for what in ("NF4", "bf16"):
        losses = losses_of(rows, what)
        if len(losses) > 1:
            parts.append(
                f"- losses of the {what} sides differ by at most {100 * apart(losses):.2f} % in any step"
            )
    return parts


def losses_of(rows: Mapping[str, Mapping[str, Any]], stored: str) -> list[Sequence[float]]:
    """Of the sides whose base is stored so."""
    found = {name: row["losses"] for name, row in rows.items() if "losses" in row}
    return [losses for name, losses in found.items() if ("NF4" in name) is (stored == "NF4")]


def apart(losses: Sequence[Sequence[float]]) -> float:
    """How far the losses of several sides lie apart, at most, relative to the least."""
    return max(max(step) / min(step) - 1 for step in zip(*losses, strict=True))


def _met(yes: bool) -> str:
    return "met" if yes else "**not met**"


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    work, versions = found["work"], found["versions"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    ran = [row for row in found["sides"].values() if "seconds" in row]
    about = (
        ""
        if not ran
        else f" P = {ran[0]['P'] / 1e9:.3f} B, {ran[0]['trained'] / 1e6:.1f} M trained."
    )
    parts = [
        f"# LoRA r={work['rank']} at the shape of {'a toy' if work['tiny'] else 'Llama-3-8B'}, bf16, "
        f"{work['rows']} × {work['tokens']:,} random tokens",
        "",
        f"{found['device']}; {said}; commit {found['commit']}. Made by `python -m benchmarks gpu`. Medians of "
        f"{work['steps']} steps (least … most) after {work['warmup']} of warm-up, each between two synchronisations of "
        f"the device.{about}",
        "",
        "![tokens/s and memory](gpu.svg)",
        "",
        "| side | tokens/s | of the measured bf16 peak at 4·P | allocated at most, GB | reserved, GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["sides"].items():
        if "seconds" not in row:
            why = row.get("out_of_memory") or row["failed"]
            label = "out of memory" if "out_of_memory" in row else "failed"
            parts.append(f"| {name} | {label}: {why} | | | |")
            continue
        one = figures(row)
        parts.append(
            f"| {name} | {one['rate'].text(0)} | {one['share']:.1%} of {row['peak_operations'] / 1e12:.1f} TFLOP/s "
            f"| {one['allocated']:.2f} | {one['reserved']:.2f} |"
        )
    parts += ["", *verdicts(found["sides"]), "", "## Kernels beside their plain twins", ""]
    parts += ["| kernel | shape | way | ms | ms of plain torch | off by | |"]
    parts += ["|---|---|---|---|---|---|---|"]
    for proof in found["proofs"]:
        shape = " × ".join(f"{size:,}" for size in proof["shape"])
        parts.append(
            f"| {proof['kernel']} | {shape} | {proof['way']} | {proof['ms']:.3f} | {proof['plain_ms']:.3f} "
            f"| {proof['off']:.1e} | {'✔' if proof['equal'] else '✗'} |"
        )
    if not any(proof["way"] == "Triton" for proof in found["proofs"]):
        parts += ["", "There is no Triton kernel here: it takes a CUDA device and Triton."]
    return "\n".join([*parts, ""])


def picture(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Bars of rate and memory."""
    done = {name: figures(row) for name, row in rows.items() if "seconds" in row}
    groups = {
        "tokens/s": {n: (f["rate"].median, f"{f['rate'].median:,.0f}") for n, f in done.items()},
        "GB allocated at most": {n: (f["allocated"], f"{f['allocated']:.1f}") for n, f in done.items()},
    }  # fmt: skip
    return bars({what: found for what, found in groups.items() if found}, ours=OURS, wide=760)


def write(found: Mapping[str, Any], folder: Path) -> None:
    """JSON, Markdown and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(table(found), encoding="utf-8")
    (folder / "gpu.svg").write_text(picture(found["sides"]), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "triton", "bitsandbytes"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="default: 4096, or 32 where tiny")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=4, help="of the CPU")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES))
    parser.add_argument("--tiny", action="store_true", help="on the CPU; says nothing")
    parser.add_argument("--out", type=Path, default=core.ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    options.tokens = options.tokens or (32 if options.tiny else 4096)
    return options


def main(argv: Sequence[str]) -> int:
    """Compare kernels, measure all sides, and write; 1 where a kernel or a loss is not what it should be."""
    import torch

    options = _parsed(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise SideError(
            "gpu measures a step on CUDA, and torch finds no CUDA device here; run it where there is one, or see that "
            "it runs with --tiny."
        )
    work = {key: getattr(options, key) for key in ("rows", "tokens", "rank", "warmup", "steps", "tiny")}  # fmt: skip
    found: dict[str, Any] = {
        "work": work,
        "machine": machine(),
        "device": "CPU" if options.tiny else torch.cuda.get_device_name(),
        "versions": _versions(),
        "commit": commit(),
        "proofs": proofs(options),
        "sides": {},
    }
    for name in chosen(options.sides):
        row = found["sides"][name] = measured(name, options)
        said = f"{figures(row)['rate'].text(0)} tokens/s" if "seconds" in row else str(row)
        print(f"{name}: {said}", flush=True)
        write(found, options.out)
    print(table(found))
    wrong = [proof for proof in found["proofs"] if not proof["equal"]]
    dense = losses_of(found["sides"], "bf16")
    return int(bool(wrong) or (len(dense) > 1 and apart(dense) > LOSS_TOLERANCE))
