"""Results as JSON (all samples) and Markdown (the table), with machine, versions, date and commit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.core import ALLOCATORS, ROOT

PACKAGES = ("trimtab", "peft", "torch", "transformers")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side")
    parser.add_argument(
        "--patience",
        type=float,
        default=60,
        help="seconds a round waits for other processes to be quiet",
    )
    parser.add_argument("--allocator", nargs="+", choices=tuple(ALLOCATORS), default=[*ALLOCATORS])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="folder")


def machine() -> dict[str, Any]:
    """What this was measured on; no names."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "load_average": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit of this checkout, marked where the measured code differs from it."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}{' with changes' if changed else ''}"


def write(
    folder: Path,
    name: str,
    title: str,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    table: Sequence[str],
    notes: Sequence[str],
) -> None:
    """Print the table; write ``name.json`` and ``name.md`` to ``folder``."""
    place = machine()
    versions = {package: metadata.version(package) for package in PACKAGES}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = "\n".join(
        [
            f"# {title}",
            "",
            f"{date}, commit {commit()}. {place['cpu']}, {place['cores']} cores, {place['memory_gb']} GB, "
            f"{', '.join(place['bf16']) or 'no bf16 products'}. Python {platform.python_version()}, "
            + ", ".join(f"{package} {version}" for package, version in versions.items())
            + ".",
            f"Medians of {about['rounds']} rounds (least … most), after {about['warmup']} steps of warm-up; "
            f"P = {about['P'] / 1e6:.1f} M, {about['trained'] / 1e6:.2f} M trained.",
            "",
            *table,
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )
    found = {
        "benchmark": name,
        "title": title,
        "date": date,
        "commit": commit(),
        "machine": place,
        "versions": {"python": platform.python_version(), **versions},
        "work": about,
        "rows": rows,
        "notes": notes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(
        json.dumps(found, indent=1, default=_plain) + "\n", "utf-8"
    )
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
