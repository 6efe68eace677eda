"""Attention by matrix products (`trimtab.kernels.attention`) beside torch's own on a CPU, forward and backward.

In bf16, rows of one document as well as rows packed from several, which torch keeps apart by a dense mask. The two take
turns; the ratios are medians of those within a round. Errors are relative to fp64.

    python -m benchmarks attention              (two minutes, on a quiet machine)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from trimtab.engine.memory import keep_memory
from trimtab.kernels.attention import blocked_attention


@dataclass(frozen=True)
class Work:
    """``heads`` of queries and of keys; ``documents`` are the lengths that each row is packed from."""

    rows: int
    heads: tuple[int, int]
    documents: Sequence[int]
    width: int = 64

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    @property
    def ends(self) -> list[int]:
        sizes = torch.tensor([*self.documents] * self.rows)
        return [int(end) for end in sizes.cumsum(0)]


WORKS = {
    "16 × 128": Work(16, (9, 3), (128,)),
    "4 × 512": Work(4, (9, 3), (512,)),
    "1 × 2,048": Work(1, (9, 3), (2048,)),
    "4 × 512, 32 heads over 8": Work(4, (32, 8), (512,)),
    "1 × 2,048 of documents of 50 to 400": Work(
        1, (9, 3), (400, 50, 90, 300, 200, 128, 350, 60, 170, 300)
    ),
}
SIDES = ("torch", "trimtab")


def inputs(work: Work, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = work.heads
    made = [
        torch.randn(work.rows, work.tokens, heads, work.width, generator=generator).bfloat16()
        for heads in (queries, keys, keys, queries)
    ]
    q, k, v = (tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made[:3])
    return [q, k, v, made[3].to(dtype)]


def mask(work: Work) -> Tensor | None:
    """What keeps documents apart in torch's attention; none is needed for rows of one."""
    if len(work.documents) == 1:
        return None
    which = torch.arange(len(work.documents)).repeat_interleave(torch.tensor(work.documents))
    return (which[:, None] == which).tril()[None, None]


def step(side: str, work: Work, given: Sequence[Tensor], apart: Tensor | None) -> list[Tensor]:
    """The output and the gradients of one forward and backward."""
    q, k, v, outer = given
    scale = work.width**-0.5
    if side == "trimtab":
        out = blocked_attention(q, k, v, scale, None if apart is None else work.ends)
    else:
        more: dict[str, Any] = {"is_causal": True} if apart is None else {"attn_mask": apart}
        if apart is not None:  # as transformers does: torch has no grouped queries under a mask
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, scale=scale, enable_gqa=apart is None, **more
        ).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, given[:3], outer)]


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Times and errors of both sides."""
    given, apart = inputs(work, torch.bfloat16), mask(work)
    exact = step("torch", work, inputs(work, torch.float64), apart)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    errors = {}
    for side in SIDES:  # the first is not counted
        found = step(side, work, given, apart)
        errors[side] = [
            float((mine.double() - right).norm() / right.norm())
            for mine, right in zip(found, exact, strict=True)
        ]
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            step(side, work, given, apart)
            seconds[side].append(time.perf_counter() - began)
    ratios = [
        theirs / ours for theirs, ours in zip(seconds["torch"], seconds["trimtab"], strict=True)
    ]
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {"seconds": medians, "ratio": sorted(ratios), "errors": errors}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Attention by matrix products, beside torch's own",
        "",
        f"bf16, forward and backward, heads of 64 (9 over 3 where nothing else is said); {found['machine']['cpu']}, "
        f"{found['machine']['cores']} cores; torch {found['torch']}; commit {found['commit']}. Made by "
        "`python -m benchmarks attention`. Medians of rounds in turns (least … most).",
        "",
        "| rows × tokens | torch, ms | trimtab, ms | times as fast | error of output, dq, dk, dv: torch | trimtab |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        ratio, each = row["ratio"], row["errors"]
        cells = [f"{1000 * row['seconds'][side]:.0f}" for side in SIDES]
        cells.append(f"**{statistics.median(ratio):.2f}** ({ratio[0]:.2f} … {ratio[-1]:.2f})")
        cells += [", ".join(f"{error:.1e}" for error in each[side]) for side in SIDES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="attention")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    keep_memory()
    rows = {name: measure(work, options.rounds) for name, work in WORKS.items()}
    found = {
        "machine": machine(), "commit": commit(), "torch": torch.__version__, "rows": rows
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "attention.json").write_text(
        json.dumps(found, indent=1) + "\n", encoding="utf-8"
    )
    (options.out / "attention.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
