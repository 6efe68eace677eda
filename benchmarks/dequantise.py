"""What makes a weight in few bits dense fastest on CUDA: bitsandbytes, our own kernel by Triton, or plain torch.

For the shapes of Llama-3-8B's linear layers: the time of one weight, by each of the ways that are installed, in turns,
and how far the values lie from those of plain torch (relative to the largest). It decides which way
`trimtab.kernels.fourbit.dequantise` takes first.

    python -m benchmarks dequantise             (seconds, on a CUDA device)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.core import ROOT, SideError
from benchmarks.report import commit, machine
from trimtab.kernels import accelerators, bnb, eightbit
from trimtab.kernels.fourbit import block_scales, quantise, unpacked

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
DTYPES = (torch.bfloat16, torch.float32)
Ways = Mapping[str, Callable[[], Tensor]]


def four_bit_ways(weight: Tensor, dtype: torch.dtype) -> Ways:
    """Each way from NF4 with double quantisation; the scales are part of the work."""
    packed = quantise(weight)
    codes, block, kind, shape = packed.codes, packed.block, packed.kind, packed.shape
    ways: dict[str, Callable[[], Tensor]] = {
        "plain torch": lambda: unpacked(packed, block_scales(packed), dtype)
    }
    if bnb.can(shape, block, dtype):
        ways["bitsandbytes"] = lambda: bnb.dequantised(
            codes, block_scales(packed), block, kind, shape, dtype
        )
    if accelerators.triton_for(codes):
        from trimtab.kernels import fused

        parts = (codes, packed.scales, packed.outer, packed.mean)
        ways["Triton"] = lambda: fused.four_bit(*parts, kind, block, shape, dtype)
    return ways


def eight_bit_ways(weight: Tensor, dtype: torch.dtype) -> Ways:
    """Each way from INT8 rows."""
    codes, scales = eightbit.quantise_rows(weight)
    ways: dict[str, Callable[[], Tensor]] = {
        "plain torch": lambda: eightbit.unpacked_rows(codes, scales, dtype)
    }
    if accelerators.triton_for(codes):
        from trimtab.kernels import fused

        ways["Triton"] = lambda: fused.eight_bit_rows(codes, scales, dtype)
    return ways


def compared(ways: Ways, *, warmup: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way, as the device counts them, in rounds of one turn each; and how far values lie off."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    plain = ways["plain torch"]().float()
    off = {
        name: float((way().float() - plain).abs().max() / plain.abs().max())
        for name, way in ways.items()
    }
    for number in range(warmup + rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            ways[name]()
            end.record()
            torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(start.elapsed_time(end))
    return {name: {"ms": times[name], "off": off[name]} for name in ways}


def run(*, warmup: int, rounds: int) -> dict[str, Any]:
    """Everything, on the first CUDA device."""
    entries = []
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda") * 0.02
        for dtype in DTYPES:
            for name, ways in (("NF4", four_bit_ways), ("INT8", eight_bit_ways)):
                entries.append({
                    "format": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."),
                    "ways": compared(ways(weight, dtype), warmup=warmup, rounds=rounds),
                })  # fmt: skip
                print(entries[-1]["format"], shape, entries[-1]["dtype"], flush=True)
    return {
        "machine": machine() | {"gpu": torch.cuda.get_device_name()},
        "versions": {name: _version(name) for name in ("torch", "triton", "bitsandbytes")},
        "commit": commit(),
        "entries": entries,
    }


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# What makes a weight in few bits dense",
        "",
        "Median milliseconds of one weight (range), and the largest difference from plain torch, relative to the "
        f"largest value. {found['machine']['gpu']}; {versions}; commit {found['commit']}. Made by "
        "`python -m benchmarks dequantise`.",
        "",
        "| format | shape | to | way | ms | GB/s written | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in found["entries"]:
        rows, columns = entry["shape"]
        size = rows * columns * getattr(torch, entry["dtype"]).itemsize
        for name, one in entry["ways"].items():
            middle = statistics.median(one["ms"])
            lines.append(
                f"| {entry['format']} | {rows} × {columns} | {entry['dtype']} | {name} "
                f"| {middle:.3f} ({min(one['ms']):.3f} … {max(one['ms']):.3f}) | {size / middle / 1e6:.0f} "
                f"| {one['off']:.1e} |"
            )
    return "\n".join([*lines, ""])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="dequantise")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SideError(
            "dequantise compares kernels on CUDA, and torch finds no CUDA device here; run it where there is one."
        )
    found = run(warmup=options.warmup, rounds=options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dequantise.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (options.out / "dequantise.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
