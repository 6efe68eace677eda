"""A decoding step of 32 rows with 32 different LoRA adapters in slots, beside the bare base and the path by parts.

SmolLM2-135M in bf16; each row goes on by one token after 128 in a static cache. Sides take turns; ratios are medians of
those within a round. What a step is made of is measured apart: the base's products; a model of as many layers and next
to no width, which is what calls cost; and ways to multiply each row by the factors of its own adapter, with the base's
products in between, so that factors come from memory as in a step.

Two bounds say how fast a step with adapters could be. By bytes: all weights and factors are read once, at the rate at
which a sum over as much memory reads it. By the base: its step as it is, and beside it the factors read at that rate.

    python -m benchmarks stacked                (two minutes, on a quiet machine)
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import trimtab as tt
from benchmarks.core import ROOT
from benchmarks.report import commit, machine
from recipes import assets
from trimtab.adapt.bank import bank_of
from trimtab.adapt.route import Route
from trimtab.adapt.stack import Stack
from trimtab.engine.memory import keep_memory
from trimtab.kernels.stacked import Rows, stacked_product, stacked_product_reference

ROWS = 32
CONTEXT = 128
METHODS = {
    "r=8, queries and values": "lora(rank=8, targets=['q_proj', 'v_proj'])",
    "r=16, all linear layers": "lora(rank=16)",
}
BASE, SLOTS, PARTS = "the bare base", "in slots", "by parts"


# -- a step -------------------------------------------------------------------------------------------


class Side:
    """A model with its cache, and who acts on the rows."""

    def __init__(self, model: Any, route: Callable[[], AbstractContextManager[None]]) -> None:
        self.model = model
        self.route = route
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT + 8)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (ROWS, CONTEXT), generator=generator)
        self.next = ids[:, :1].contiguous()
        with route(), torch.no_grad():
            model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def step(self) -> float:
        """Seconds of one step, after which the cache is as before."""
        began = time.perf_counter()
        with self.route():
            self.model(self.next, past_key_values=self.cache, use_cache=True)
        seconds = time.perf_counter() - began
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(1)
        return seconds


def shaken(adapter: tt.Adapter) -> tt.Adapter:
    """With factors away from zero."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.01)
    return adapter


def in_slots(base: Any, method: str) -> tuple[Side, int]:
    """A row for each of as many adapters in slots; and the bytes of these."""
    model = copy.deepcopy(base)
    one = shaken(tt.attach(model, method, "one"))
    stack = Stack.of(model)
    slots = tuple(stack.put(one) for _ in range(ROWS))
    tt.detach(model, "one")
    route = Route(((),) * ROWS, slots=slots)
    values = sum(tensor.numel() for tensor in one.tensors.values())
    size = ROWS * values * model.dtype.itemsize
    return Side(model, lambda: bank_of(model).scope(route)), size


def by_parts(base: Any, method: str) -> Side:
    """The same, each by its name."""
    model = copy.deepcopy(base)
    names = [f"a{n}" for n in range(ROWS)]
    for name in names:
        shaken(tt.attach(model, method, name))
    return Side(model, lambda: tt.rows(model, names))


def steps(base: Any, rounds: int) -> dict[str, Any]:
    """Seconds of all sides, and the ratio of the bare base's to each."""
    sides, sizes = {BASE: Side(base, nullcontext)}, {}
    for name, method in METHODS.items():
        sides[f"{SLOTS}, {name}"], sizes[name] = in_slots(base, method)
    few = next(iter(METHODS))
    sides[f"{PARTS}, {few}"] = by_parts(base, METHODS[few])
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seconds = sides[name].step()
            if number >= 0:
                taken[name].append(seconds)
    ratios = {
        name: sorted(bare / own for bare, own in zip(taken[BASE], times, strict=True))
        for name, times in taken.items()
    }
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {"seconds": medians, "ratios": ratios, "adapter_bytes": sizes}


def median(work: Callable[[], Any], times: int) -> float:
    """Seconds of the median call, the first not counted."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


@torch.no_grad()
def base_alone(base: Any, rounds: int) -> dict[str, float]:
    """Bytes and seconds of its products; seconds of calls alone; bytes a second of a sum."""
    weights = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
    given = {w.shape[1]: torch.randn(ROWS, w.shape[1], dtype=w.dtype) for w in weights}
    width = 2 * base.config.num_attention_heads
    small = {"hidden_size": width, "head_dim": 2, "intermediate_size": 8, "vocab_size": 100}
    config = LlamaConfig(**{**base.config.to_dict(), **small})
    narrow = Side(LlamaForCausalLM(config).to(base.dtype).eval(), nullcontext)
    memory = [torch.zeros(1 << 20, dtype=torch.long) for _ in range(32)]
    return {
        "bytes": sum(w.numel() * w.element_size() for w in weights),
        "products": median(lambda: [F.linear(given[w.shape[1]], w) for w in weights], rounds),
        "calls": median(narrow.step, rounds),
        "read_rate": 8 * 32 * 2**20 / median(lambda: [some.sum() for some in memory], rounds),
    }


def bmm(x: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
    """A batch of products, for one row in each slot, in order."""
    return torch.bmm(x[:, None], matrices)[:, 0]


def masked(x: Tensor, matrices: Tensor, rows: Rows) -> Tensor:
    """One product of all rows with all matrices that are below each other, x being zero but at the row's own."""
    wide = x.new_zeros(len(x), *matrices.shape[:2])
    wide[torch.arange(len(x)), rows.slots_N] = x
    return wide.flatten(1) @ matrices.flatten(0, 1)


Way = Callable[[Tensor, Tensor, Rows], Tensor]
WAYS: Mapping[str, Way] = {
    "weighted sums of a table's rows": stacked_product,
    "bmm": bmm,
    "one masked product": masked,
    "a product for each row": stacked_product_reference,
}


@torch.no_grad()
def ways(dtype: torch.dtype, rank: int, rounds: int, layers: int = 30) -> dict[str, float]:
    """Seconds of each way for queries and values of a step: x of 576 by A of both, then by B of each."""
    rows, between = Rows(range(ROWS)), torch.randn(3000, 1152, dtype=dtype)
    x = torch.randn(ROWS, 576, dtype=dtype)
    tall = torch.randn(ROWS, 1152, dtype=dtype)
    shapes = (576, 2 * rank), (rank, 576), (rank, 192)
    held = [[torch.randn(ROWS, *shape, dtype=dtype) for shape in shapes] for _ in range(layers)]
    frozen = [between.clone() for _ in range(layers)]

    def step(way: Way) -> float:
        taken = 0.0
        for weight, (a, *each) in zip(frozen, held, strict=True):
            F.linear(tall, weight)
            began = time.perf_counter()
            h = way(x, a, rows)
            for place, b in enumerate(each):
                way(h[:, place * rank : (place + 1) * rank], b, rows)
            taken += time.perf_counter() - began
        return taken

    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            found[name].append(step(way))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


# -- results ------------------------------------------------------------------------------------------


def bounds(found: Mapping[str, Any], name: str) -> dict[str, float]:
    """How fast a step with these adapters could be, as parts of the bare base's rate."""
    base, size = found["base"], found["adapter_bytes"][name]
    reading = size / base["read_rate"]
    step = found["seconds"][BASE]
    return {
        "by bytes": base["bytes"] / (base["bytes"] + size),
        "by the base": step / (step + reading),
    }


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    base, seconds = found["base"], found["seconds"]
    rate = base["bytes"] / base["products"]
    lines = [
        "# Many adapters in one batch: a decoding step",
        "",
        f"SmolLM2-135M in bf16, {ROWS} rows after {CONTEXT} tokens each, every row its own adapter; "
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores; torch {found['torch']}; commit "
        f"{found['commit']}. Made by `python -m benchmarks stacked`. Medians of rounds in turns (least … most).",
        "",
        "| side | a step, ms | of the bare base's rate | bound by bytes | bound by the base |",
        "|---|---|---|---|---|",
    ]
    for side, ratio in found["ratios"].items():
        name = side.partition(", ")[2]
        limits = bounds(found, name).values() if name else ()
        told = "".join(f" {limit:.2f} |" for limit in limits) or " | |"
        spread = f"{statistics.median(ratio):.2f} ({ratio[0]:.2f} … {ratio[-1]:.2f})"
        lines.append(f"| {side} | {1000 * seconds[side]:.1f} | {spread} |{told}")
    lines += [
        "",
        f"The base's products read {base['bytes'] / 1e6:.0f} MB in {1000 * base['products']:.1f} ms "
        f"({rate / 1e9:.1f} GB/s, {ROWS * rate / 1e9:.0f} GFLOP/s); a sum reads memory at "
        f"{base['read_rate'] / 1e9:.1f} GB/s; calls of as many layers of next to no width take "
        f"{1000 * base['calls']:.1f} ms. The adapters have "
        + " and ".join(
            f"{size / 1e6:.1f} MB ({name})" for name, size in found["adapter_bytes"].items()
        )
        + ".",
        "",
        "Each row by the factors of its own adapter, for queries and values of all layers, ms:",
        "",
        f"| | {' | '.join(WAYS)} |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for name, each in found["ways"].items():
        cells = " | ".join(f"{1000 * each[way]:.1f}" for way in WAYS)
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, ""])


def measured(base: Any, rounds: int, layers: int = 30) -> dict[str, Any]:
    """All of it."""
    return {
        "machine": machine(),
        "commit": commit(),
        "torch": torch.__version__,
        "base": base_alone(base, rounds),
        "ways": {
            f"{str(dtype).removeprefix('torch.')}, r={rank}": ways(dtype, rank, rounds, layers)
            for dtype in (torch.bfloat16, torch.float32)
            for rank in (8, 16)
        },
        **steps(base, rounds),
    }


def main(argv: list[str]) -> int:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="stacked")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_memory()
    base = tt.load(str(assets.smollm2()), dtype="bfloat16").model.eval()
    found = measured(base, options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "stacked.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.out / "stacked.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
