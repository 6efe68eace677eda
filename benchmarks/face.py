"""`trimtab.peft` beside PEFT: what importing it, wrapping a model, loading many adapters and a `Trainer` run cost.

imports   ``from PACKAGE import LoraConfig, get_peft_model`` after torch and transformers, in fresh processes
meta      ``get_peft_model`` on a model of the shape of Llama-2-7B without weights, in fresh processes
load      many saved adapters loaded into one model, one after another
trainer   the same ``Trainer`` script with only the import changed, by turns

python -m benchmarks face                    measure all
python -m benchmarks face --parts meta load  measure some
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import core, report
from benchmarks.core import ROOT, Patience, Side, Spread
from benchmarks.face_sides import save_adapters

OURS, PEER = "trimtab.peft", "peft"
SIDES = (OURS, PEER)
PARTS = ("imports", "meta", "load", "trainer")
NOTES = (
    "alternating order, medians (least … most); ratios are of the same round",
    "imports: over `import torch, transformers` and `from transformers import PreTrainedModel`, which every user of "
    "either pays; `trimtab.peft` looks for an installed `peft`, and imports it where there is one, and `peft` an "
    "installed bitsandbytes, most of what either takes",
    "meta: the first call of a process, which imports what the method needs, and the second",
    "load: adapters that PEFT saved, r = 8 on q_proj and v_proj; `own` are the same, saved by Trimtab, whose "
    "checksums are compared on the way",
    "trainer: transformers' Trainer, LoRA r = 16 on all linear layers; tokens/s count the tokens that the model sees",
)


# -- imports ------------------------------------------------------------------------------------------

IMPORTS = {
    "trimtab.peft": ("", "from trimtab.peft import LoraConfig, get_peft_model"),
    "trimtab.peft, no peft installed": (
        "sys.modules['peft'] = None", "from trimtab.peft import LoraConfig, get_peft_model",
    ),
    "trimtab.peft, no bitsandbytes installed": (
        "sys.modules['bitsandbytes'] = None", "from trimtab.peft import LoraConfig, get_peft_model",
    ),
    "import trimtab.peft": ("", "import trimtab.peft"),
    "peft": ("", "from peft import LoraConfig, get_peft_model"),
}  # fmt: skip


def imports(rounds: int) -> dict[str, Any]:
    """Seconds that each import adds, in fresh processes."""
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(rounds):
        for name in list(IMPORTS)[:: 1 if number % 2 == 0 else -1]:
            before, line = IMPORTS[name]
            found[name].append(_import_seconds(before, line))
            print(f"  import {name}: {found[name][-1]:.3f} s", flush=True)
    return {
        "seconds": {name: Spread.of(values) for name, values in found.items()},
        "samples": found,
    }


def _import_seconds(before: str, line: str) -> float:
    code = (
        f"import sys, time\n{before}\nimport torch, transformers\nfrom transformers import PreTrainedModel\n"
        f"start = time.perf_counter()\n{line}\nprint(time.perf_counter() - start)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise core.SideError(f"{line}: {done.stderr}")
    return float(done.stdout.split()[-1])


# -- a 7B-shaped model on the meta device ---------------------------------------------------------------


def meta(rounds: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Seconds of the first and the second call, in fresh processes."""
    found: dict[str, dict[str, list[float]]] = {n: {"first": [], "second": []} for n in SIDES}
    counts = []
    for number in range(rounds):
        for name in SIDES[:: 1 if number % 2 == 0 else -1]:
            side = Side(name, "benchmarks.face_sides:Meta", {"package": name, "sizes": dict(sizes)})
            with core.workers([side], "default", 1) as running:
                for which in ("first", "second"):
                    result = running[name].call("step", number)
                    found[name][which].append(result["seconds"])
                    counts.append(tuple(result["sizes"]))
            print(f"  get_peft_model {name}: {found[name]['first'][-1]:.3f} s", flush=True)
    if len(set(counts)) != 1:
        raise core.SideError(f"the sides differ in size: {sorted(set(counts))}")
    spreads = {n: {w: Spread.of(v) for w, v in each.items()} for n, each in found.items()}
    return {
        "seconds": spreads,
        "trained": counts[0][0],
        "parameters": counts[0][1],
        "samples": found,
    }


# -- loading many adapters ------------------------------------------------------------------------------


def load(rounds: int, count: int, sizes: Mapping[str, int], patience: Patience) -> dict[str, Any]:
    """Seconds of loading all, and of the last over the first after the model was wrapped."""
    with tempfile.TemporaryDirectory() as place:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_adapters(Path(place), count, sizes)
        named = {
            "trimtab.peft": (OURS, "peft"),
            "trimtab.peft, own": (OURS, "own"),
            "peft": (PEER, "peft"),
        }
        sides = [
            Side(name, "benchmarks.face_sides:Load",
                 {"package": package, "folder": f"{place}/{kind}", "count": count, "sizes": dict(sizes)})
            for name, (package, kind) in named.items()
        ]  # fmt: skip
        with core.workers(sides, "default", 1) as running:
            samples = core.take_turns(
                running, warmup=1, rounds=rounds, patience=patience,
                say=lambda s: print(f"  load {s.side}: {sum(s.result['each']):.2f} s", flush=True),
            )  # fmt: skip
    said = [sample.result["said"] for sample in samples]
    if not max(said) - min(said) < 1e-2 * max(said):
        raise core.SideError(f"the sides compute different things: {said}")
    total = {n: Spread.of(sum(s.result["each"]) for s in core.of_side(samples, n)) for n in named}
    growth = {
        n: Spread.of(s.result["each"][-1] / s.result["each"][1] for s in core.of_side(samples, n))
        for n in named
    }
    faster = core.ratio(samples, PEER, "trimtab.peft", lambda s: sum(s.result["each"]))
    own = core.ratio(samples, PEER, "trimtab.peft, own", lambda s: sum(s.result["each"]))
    return {"adapters": count, "seconds": total, "last_over_first": growth, "faster": faster, "faster_own": own,
            "samples": samples}  # fmt: skip


# -- the Trainer ----------------------------------------------------------------------------------------


def trainer(
    options: Mapping[str, Any], *, threads: int, warmup: int, rounds: int, patience: Patience
) -> dict[str, Any]:
    """Tokens per second of either side."""
    sides = [Side(n, "benchmarks.face_sides:Train", {"package": n, **options}) for n in SIDES]
    with core.workers(sides, "default", threads) as running:
        samples = core.take_turns(
            running, warmup=warmup, rounds=rounds, patience=patience,
            say=lambda s: print(f"  trainer {s.side}: {s.rate:.0f} tokens/s, loss {s.result['loss']:.4f}", flush=True),
        )  # fmt: skip
    if len({sample.result["trained"] for sample in samples}) != 1:
        raise core.SideError("the sides train different numbers of parameters")
    losses = {n: [s.result["loss"] for s in samples if s.side == n] for n in SIDES}
    apart = max(abs(a - b) / b for a, b in zip(losses[OURS], losses[PEER], strict=True))
    if not apart < 0.02:
        raise core.SideError(f"the losses disagree by {apart:.3f}: {losses}")
    return {
        "rate": {n: Spread.of(s.rate for s in core.of_side(samples, n)) for n in SIDES},
        "peak_gb": {n: Spread.of(s.peak_bytes / 1e9 for s in core.of_side(samples, n)) for n in SIDES},
        "speed_ratio": core.ratio(samples, OURS, PEER, lambda s: s.rate),
        "memory_ratio": core.ratio(samples, OURS, PEER, lambda s: s.peak_bytes),
        "loss_apart": apart,
        "samples": samples,
    }  # fmt: skip


# -- the report -----------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> list[str]:
    """What was measured, as Markdown."""
    lines: list[str] = []
    if part := found.get("imports"):
        lines += ["## Import, seconds over torch and transformers", "", "| | s |", "|---|---|"]
        lines += [f"| {name} | {spread.text(3)} |" for name, spread in part["seconds"].items()]
    if part := found.get("meta"):
        lines += [
            "", f"## `get_peft_model`, {part['parameters'] / 1e9:.2f} B parameters on the meta device", "",
            "| | first call, s | second call, s |", "|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {name} | {each['first'].text(3)} | {each['second'].text(3)} |"
            for name, each in part["seconds"].items()
        ]
    if part := found.get("load"):
        lines += [
            "",
            f"## Loading {part['adapters']} adapters",
            "",
            "| | s | last over second |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {spread.text()} | {part['last_over_first'][name].text()} |"
            for name, spread in part["seconds"].items()
        ]
        lines += [
            "",
            f"**{part['faster'].text()} times as fast**; own folders {part['faster_own'].text()} times.",
        ]
    if part := found.get("trainer"):
        lines += ["", "## `Trainer`", "", "| | tokens/s | peak memory, GB |", "|---|---|---|"]
        lines += [
            f"| {n} | {part['rate'][n].text(0)} | {part['peak_gb'][n].text()} |" for n in SIDES
        ]
        lines += [
            f"| **ratio** | **{part['speed_ratio'].text()}** | **{part['memory_ratio'].text()}** |", "",
            f"Losses differ by at most {100 * part['loss_apart']:.2f} %.",
        ]  # fmt: skip
    return lines


def write(folder: Path, about: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """``face.json`` and ``face.md``; a part that was not measured now stays as it was in the former."""
    file = folder / "face.json"
    before = json.loads(file.read_text("utf-8"))["parts"] if file.is_file() else {}
    place, commit = report.machine(), report.commit()
    versions = {package: metadata.version(package) for package in report.PACKAGES}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    now = {
        name: {**part, "of": f"{date}, commit {commit}, {about['rounds']} rounds"}
        for name, part in found.items()
    }
    every = core.spreads(before) | now
    found = {name: every[name] for name in PARTS if name in every}
    head = (
        f"{place['cpu']}, {place['cores']} cores, {place['memory_gb']} GB. Python "
        f"{platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items()) + "."
    )
    text = [
        "# `trimtab.peft` beside PEFT",
        "",
        head,
        "",
        *(
            line
            for name, part in found.items()
            for line in (*tables({name: part}), "", f"{part['of']}.")
        ),
        "",
        *(f"- {note}" for note in NOTES),
        "",
    ]
    whole = {
        "benchmark": "face", "machine": place,
        "versions": {"python": platform.python_version(), **versions}, "work": dict(about), "parts": dict(found),
        "notes": NOTES,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "face.json").write_text(
        json.dumps(whole, indent=1, default=report._plain) + "\n", "utf-8"
    )
    (folder / "face.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def main(argv: Sequence[str]) -> int:
    """Measure and write the report. Raises `SideError` where the sides compute different things."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks face", description=__doc__)
    report.add_options(parser)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--model", help="folder of a causal model for the Trainer (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of a Trainer run")
    parser.add_argument("--fp32", action="store_true", help="train in fp32 instead of bf16")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument(
        "--tiny", action="store_true", help="small models, to try the benchmark itself"
    )
    options = parser.parse_args(argv)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64} if options.tiny else {}  # fmt: skip
    patience = Patience(seconds=options.patience)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "imports": lambda: imports(options.rounds),
        "meta": lambda: meta(options.rounds, small),
        "load": lambda: load(options.rounds, options.adapters, small, patience),
        "trainer": lambda: trainer(
            {"model": _model(options.model), "rows": options.rows, "tokens": options.tokens, "steps": options.steps,
             "bf16": not options.fp32},
            threads=options.threads, warmup=options.warmup, rounds=options.rounds, patience=patience,
        ),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name in options.parts:
        print(f"face, {name}", flush=True)
        found[name] = parts[name]()
    about = {k: v for k, v in vars(options).items() if k not in ("out", "model", "allocator")}
    write(Path(options.out), about, found)
    return 0


def _model(folder: str | None) -> str:
    from recipes import assets

    return folder or str(assets.smollm2())
