"""Does a base in four bits cost quality? SmolLM2-135M on film reviews, LoRA on bf16 and on NF4, three seeds each.

The rows, batches, schedule and rate are those of the demo. Each run is a process of its own; one that is done is kept
in the results file, and not repeated.

    python -m benchmarks qlora_quality          (half an hour on two cores; it resumes)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import full_vs_peft
from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets

BASES = {"bf16": {}, "NF4": {"storage": "nf4"}}
SEEDS = (0, 1, 2)
METHOD = {"kind": "lora", "rank": 16, "alpha": 32}
LR = 5e-4
ROWS = (640, 400)


def run(path: Path, rows: tuple[int, int]) -> dict[str, Any]:
    """All runs that are not in the results yet."""
    found: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    )
    if found["runs"] and found["rows"] != list(rows):
        raise SystemExit(
            f"{path} was measured with {found['rows']} rows; remove it to measure anew."
        )
    found |= {"rows": list(rows), "machine": machine(), "commit": commit()}
    done = {(entry["base"], entry["seed"]) for entry in found["runs"]}
    files = assets.write_sentiment(
        assets.cache() / "qlora_quality", train=rows[0], held_out=rows[1]
    )
    for seed in SEEDS:
        for base, options in BASES.items():
            if (base, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                call = json.dumps(
                    [[str(f) for f in files], f"{scratch}/run", options | {"seed": seed}]
                )
                said = subprocess.run(
                    [sys.executable, "-m", "benchmarks.qlora_quality", "--one", call],
                    check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                )  # fmt: skip
            entry = {"base": base, "seed": seed, **json.loads(said.stdout.splitlines()[-1])}
            found["runs"].append(entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            loss, right = entry["held_out_loss"]["value"], entry["accuracy"]["value"]
            print(f"{base}, seed {seed}: loss {loss:.4f}, accuracy {right:.4f}", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# LoRA on a base in four bits, beside bf16",
        "",
        f"SmolLM2-135M-Instruct, {found['rows'][0]} film reviews to learn from, {found['rows'][1]} held out; "
        f"LoRA r={METHOD['rank']}, rate {LR:g}; {found['machine']['cpu']}, {found['machine']['cores']} cores; commit "
        f"{found['commit']}. Made by `python -m benchmarks qlora_quality`.",
        "",
        "| base | seed | held-out loss (95 %) | accuracy (95 %) | perplexity of other text | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    losses: dict[str, list[float]] = {base: [] for base in BASES}
    for entry in sorted(found["runs"], key=lambda entry: (entry["seed"], entry["base"])):
        loss, right = entry["held_out_loss"], entry["accuracy"]
        losses[entry["base"]].append(loss["value"])
        lines.append(
            f"| {entry['base']} | {entry['seed']} | {loss['value']:.4f} [{loss['low']:.4f}, {loss['high']:.4f}] "
            f"| {right['value']:.4f} [{right['low']:.4f}, {right['high']:.4f}] | {full_vs_peft.perplexities(entry)} "
            f"| {entry['peak_bytes'] / 2**30:.2f} GiB |"
        )
    if all(losses.values()):
        means = {base: statistics.mean(values) for base, values in losses.items()}
        lines += [
            "",
            f"Mean held-out loss: bf16 {means['bf16']:.4f}, NF4 {means['NF4']:.4f}; "
            f"difference {means['NF4'] - means['bf16']:+.4f}.",
        ]
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="qlora_quality")
    parser.add_argument("--rows", nargs=2, type=int, default=ROWS, metavar=("TRAIN", "HELD_OUT"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        (train, held), out, given = json.loads(options.one)
        files = (Path(train), Path(held))
        print(json.dumps(full_vs_peft.one(METHOD, LR, files, Path(out), **given)))
        return 0
    found = run(options.out / "qlora_quality.json", tuple(options.rows))
    (options.out / "qlora_quality.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
