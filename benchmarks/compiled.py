"""A frozen block, forward and backward to its input: as transformers writes it, compiled, and in Trimtab's way.

    eager      the block of the model as it comes
    compiled   the same through `torch.compile` (inductor), after it has been compiled
    trimtab    eager, with the norms, MLP and attention that training puts in their place (`trimtab.adapt.lean`)

On a CPU, in bf16, one process, the ways by turns. It says whether compiling blocks for training on a CPU would pay.

    python -m benchmarks compiled
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs, steps
from benchmarks.core import Spread

WAYS = ("eager", "compiled", "trimtab")
NOTES = (
    "ms: median of the rounds (least … most), forward and backward; gradients go to the input alone, as below a frozen "
    "block without adapters; ratios are medians of the ratios within each round",
    "products are of the same size on all sides; what may differ is all between them",
)


@dataclass(frozen=True)
class Work:
    """One block of ``model``, over ``rows`` × ``tokens``."""

    model: str
    rows: int
    tokens: int


def ways(work: Work) -> tuple[Any, dict[str, Callable[[], float]]]:
    """The model, and for each way what takes one step and says its seconds."""
    from transformers import AutoModelForCausalLM

    from trimtab.adapt import attention
    from trimtab.adapt.lean import Lean

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16)
    model.requires_grad_(False)
    block = model.model.layers[len(model.model.layers) // 2]
    width = model.config.hidden_size
    x = torch.randn(work.rows, work.tokens, width, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    places = model.model.rotary_emb(x, torch.arange(work.tokens)[None])
    compiled = torch.compile(block)

    def once(called: Callable[..., Any]) -> float:
        began = time.perf_counter()
        out = called(x, position_embeddings=places)
        (out[0] if isinstance(out, tuple) else out).backward(grad)
        seconds = time.perf_counter() - began
        x.grad = None
        return seconds

    def ours() -> float:
        with ExitStack() as stack:
            stack.enter_context(attention.Ours(model))
            stack.enter_context(Lean(model))
            return once(block)

    return model, {
        "eager": lambda: once(block),
        "compiled": lambda: once(compiled),
        "trimtab": ours,
    }


def main(argv: Sequence[str]) -> int:
    """Measure and write the report."""
    parser = steps.parser("compiled", __doc__)
    steps.add_model(parser)
    options: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    work = Work(steps.model_folder(options.model), options.rows, options.tokens)
    model, made = ways(work)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.warmup + options.rounds):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            took = made[way]()
            if number >= options.warmup:
                seconds[way].append(took)
    size = runs.size(model, model.get_output_embeddings().weight.numel())
    spread = {way: Spread.of(values) for way, values in seconds.items()}
    over = {
        way: Spread.of(a / b for a, b in zip(seconds["eager"], seconds[way], strict=True))
        for way in WAYS
    }
    lines = ["| way | ms | eager over it |", "|---|---|---|"]
    lines += [f"| {way} | {spread[way].text(1, 1000)} | {over[way].text()} |" for way in WAYS]
    row = {**size, "trained": 0, "seconds": spread, "over": over}
    title = (
        f"A frozen block of {Path(work.model).name} in bf16, {work.rows} × {work.tokens} tokens, "
        f"{options.threads} threads"
    )
    steps.write("compiled", title, work, options, [row], lines, NOTES)
    return 0
