"""How a LoRA step of ours grows with layers, width, rank, vocabulary and context, beside theory.

    python -m benchmarks growth               (some minutes)
    python -m benchmarks growth --quick       tiny models and one round, to see that it runs

Bf16 decoders of Llama's shape with random weights are made from a config, with LoRA on all linear layers, and one size
is varied at a time.

Seconds: the models of a factor live in one process (the allocator keeps what is freed), and each round takes a step of
each, in alternating order, beside the machine's best product, its best sum of two tensors, and a decoder of next to no
numbers, whose step is calls.

Memory, in another process: of all tensors of a step at its heaviest moment (`benchmarks.alive`), which are what the
formula counts; the resident bytes in a step above those before the first one, which hold what the allocator loses and
libraries keep, too; and what the model itself added.

A slope is that of a straight line through the points on two logarithmic axes. Theory's is that of its formula
(`benchmarks.growth_theory`) over the same points, not a bare exponent: at these sizes several terms mix.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import core
from benchmarks.alive import Alive
from benchmarks.core import Patience, Side, Spread
from benchmarks.growth_theory import Rates, Sizes, model_bytes, operations, seconds, step_bytes
from benchmarks.lines import lines, slope
from benchmarks.matmul import Matmul
from benchmarks.report import commit, machine
from benchmarks.worker import STATUS

ADAPTER = "default"
NEAR = 0.1
"""How far a measured slope may lie from theory's."""
FACTORS: Mapping[str, tuple[Sizes, Sequence[int]]] = {
    "layers": (Sizes(), (2, 4, 8, 16, 32)),
    "width": (Sizes(), (512, 768, 1024, 1536, 2048)),
    "rank": (Sizes(), (16, 64, 256, 1024)),
    "vocabulary": (Sizes(layers=1), (4096, 16384, 32768, 65536)),
    "tokens": (Sizes(width=256, rows=1), (512, 1024, 2048, 4096, 8192)),
}
"""What is varied, the sizes that stay, and the values."""
TINY: Mapping[str, tuple[Sizes, Sequence[int]]] = {
    "layers": (Sizes(1, 64, 4, 64, 16, 1), (1, 2)),
    "width": (Sizes(1, 64, 4, 64, 16, 1), (64, 128)),
    "rank": (Sizes(1, 64, 4, 64, 16, 1), (4, 8)),
    "vocabulary": (Sizes(1, 64, 4, 64, 16, 1), (64, 128)),
    "tokens": (Sizes(1, 64, 4, 64, 16, 1), (16, 32)),
}
WHAT = {
    "seconds": "seconds of a step",
    "tensors": "tensors of a step",
    "step": "resident memory of a step",
    "model": "resident memory of the model",
}
BYTES = {"tensors": step_bytes, "step": step_bytes, "model": model_bytes}
"""What each of them is in theory."""
PAGE = 4096
LEAST = Sizes(4, 64, 1, 64, 8, 1)
"""A decoder of which a step is calls and little else."""


def points(base: Sizes, factor: str, values: Sequence[int]) -> list[Sizes]:
    """The sizes that are measured."""
    return [replace(base, **{factor: value}) for value in values]


# -- the processes -----------------------------------------------------------------------------------


class Trained:
    """A decoder with an adapter, and its engine."""

    def __init__(self, sizes: Sizes) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        import trimtab as tt
        from trimtab.engine import Engine
        from trimtab.optim.params import AdamParams

        heads = sizes.width // 64
        config = LlamaConfig(
            vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=max(sizes.tokens, 32), use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tt.attach(model, tt.LoRA(rank=sizes.rank, alpha=2.0 * sizes.rank), name=ADAPTER)
        self.sizes = sizes
        self.engine = Engine(model, micro_tokens=sizes.seen)
        self.adam = AdamParams(lr=1e-4, clip=None)

    def step(self, number: int) -> float:
        """One step on random tokens; its loss."""
        from trimtab.data import Datum

        sizes, generator = self.sizes, torch.Generator().manual_seed(number)
        size = (sizes.rows, sizes.tokens)
        weights = (*(1.0,) * (sizes.tokens - 1), 0.0)
        rows = torch.randint(sizes.vocabulary, size, generator=generator).tolist()
        data = [Datum(tuple(row), (*row[1:], 0), weights) for row in rows]
        loss = self.engine.forward_backward(data, ADAPTER).mean
        self.engine.optim_step(ADAPTER, self.adam)
        return loss


class Timed:
    """The side whose ``step`` takes a step of each of several models, and measures the machine's rates."""

    def __init__(self, points: Sequence[Mapping[str, int]]) -> None:
        self.trained = [Trained(Sizes(**point)) for point in points]
        self.least = Trained(LEAST)
        self.products = Matmul(repeat=3)
        self.one, self.other, self.sum = (
            torch.zeros(1 << 22, dtype=torch.bfloat16) for _ in range(3)
        )

    def step(self, number: int) -> dict[str, Any]:
        order = list(range(len(self.trained)))
        found = [0.0] * len(order)
        for index in order if number % 2 == 0 else order[::-1]:
            start = time.perf_counter()
            self.trained[index].step(number)
            found[index] = time.perf_counter() - start
        start = time.perf_counter()
        self.least.step(number)
        calls = (time.perf_counter() - start) / LEAST.layers
        rates = [rate for sizes in self.products.step(number).values() for rate in sizes.values()]
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.add(self.one, self.other, out=self.sum)
            times.append(time.perf_counter() - start)
        moved = 3 * self.sum.nbytes / min(times)
        return {"seconds": found, "operations": 1e9 * max(rates), "bytes": moved, "calls": calls}


class Weighed:
    """The side that has one model at a time, and whose memory is measured."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)
        self.trained: Trained | None = None

    def build(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Resident bytes before the model and with it."""
        self.trained = None
        before = self._resident()
        self.trained = Trained(Sizes(**sizes))
        return {"before": before, "after": self._resident()}

    def step(self, number: int) -> dict[str, Any]:
        assert self.trained is not None
        return {"loss": self.trained.step(number)}

    def alive(self, number: int) -> int:
        """The most bytes of tensors that there are in a step and were not there before the first one."""
        assert self.trained is not None
        engine = self.trained.engine
        moments = engine.optimiser_tensors(ADAPTER)
        with Alive([*engine.model.parameters(), *engine.model.buffers(), *moments]) as counted:
            self.trained.step(number)
        return counted.most + sum(tensor.nbytes for tensor in moments)

    def _resident(self) -> int:
        gc.collect()
        self.libc.malloc_trim(0)
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


# -- measuring ---------------------------------------------------------------------------------------


def weighed(sizes: Sequence[Sizes], running: core.Worker) -> list[dict[str, int]]:
    """Bytes of the step and of the model, at each point; the second step counts, since the first makes the optimiser's
    state. The first point is done twice: at first, libraries make what they keep for good."""
    found = []
    for point in (sizes[0], *sizes):
        built = running.call("build", asdict(point))
        running.step(0)
        peak = running.step(1).peak_bytes
        model, step = built["after"] - built["before"], peak - built["after"]
        found.append(
            {"tensors": running.call("alive", 2), "step": step, "model": model, "peak": peak}
        )
    return found[1:]


def timed(sizes: Sequence[Sizes], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each point in each counted round, and the rates of the machine."""
    side = Side("seconds", f"{__name__}:Timed", {"points": [asdict(point) for point in sizes]})
    patience = Patience(seconds=options.patience, factor=2)
    with core.workers([side], "tuned", options.threads) as running:
        samples = core.take_turns(
            running, warmup=options.warmup, rounds=options.rounds, patience=patience
        )
    counted = core.of_side(samples, "seconds")
    return {
        "rounds": [sample.result["seconds"] for sample in counted],
        "operations": statistics.median(sample.result["operations"] for sample in counted),
        "bytes": statistics.median(sample.result["bytes"] for sample in counted),
        "calls": statistics.median(sample.result["calls"] for sample in counted),
        "others": Spread.of(sample.others for sample in counted),
        "peak": max(sample.peak_bytes for sample in samples),
    }


def measured(factor: str, sizes: Sequence[Sizes], options: argparse.Namespace) -> dict[str, Any]:
    """All of one factor: for each quantity what was measured, what theory says, and both slopes."""
    values = [asdict(point)[factor] for point in sizes]
    memory = Side("memory", f"{__name__}:Weighed", {})
    with core.workers([memory], "tuned", options.threads) as running:
        bytes_of = weighed(sizes, running["memory"])
    times = timed(sizes, options)
    rates = Rates(times["operations"], times["bytes"], times["calls"])
    rounds = times["rounds"]
    found: dict[str, Any] = {"factor": factor, "values": values, "sizes": list(map(asdict, sizes))}
    found |= {"times": times, "memory": bytes_of, "quantities": {}}
    found["quantities"]["seconds"] = {
        **compared(
            values,
            [statistics.median(each) for each in zip(*rounds, strict=True)],
            [seconds(point, rates) for point in sizes],
        ),
        "slopes": Spread.of(slope(list(zip(values, one, strict=True))) for one in rounds),
        "operations": slope(list(zip(values, map(work, sizes), strict=True))),
    }
    for quantity, formula in BYTES.items():
        done = [max(one[quantity], PAGE) / 1e6 for one in bytes_of]
        found["quantities"][quantity] = compared(values, done, [formula(p) / 1e6 for p in sizes])
    for quantity, one in found["quantities"].items():
        print(f"  {WHAT[quantity]}: {one['slope']:.2f}, theory {one['expected']:.2f}", flush=True)
    return found


def work(sizes: Sizes) -> float:
    """All operations of a step."""
    return float(sum(operations(sizes).values()))


def compared(
    values: Sequence[int], found: Sequence[float], theory: Sequence[float]
) -> dict[str, Any]:
    """Measured and theoretical values, and the slopes through both."""
    here, there = (slope(list(zip(values, ys, strict=True))) for ys in (found, theory))
    slopes = {"slope": here, "expected": there, "near": abs(here - there) <= NEAR}
    return {"measured": list(found), "theory": list(theory), **slopes}


# -- the report --------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    place = found["machine"]
    parts = [
        "# How a step grows: LoRA on all linear layers, bf16",
        "",
        f"{place['cpu']}, {place['cores']} cores, {place['memory_gb']} GB; torch {torch.__version__}, commit "
        f"{found['commit']}; {found['threads']} threads, {found['rounds']} rounds. Made by "
        "`python -m benchmarks growth`.",
        "",
        "Slopes on two logarithmic axes, through the points below. Theory: the slope of the formula "
        "(benchmarks/growth_theory.py) over the same points; its seconds are operations over the machine's best "
        "product, bytes between products over its best sum of two tensors, and calls, all three measured beside the "
        "steps; one column has the slope of operations alone. Tensors are those of the step at its heaviest moment; "
        "resident memory holds what the allocator cannot use again and what libraries keep, too. ✗: "
        f"further than {NEAR} from theory.",
        "",
        "| factor | quantity | measured | theory | apart | | of operations alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["factors"]:
        for quantity, one in row["quantities"].items():
            span = one.get("slopes")
            shown = f"{one['slope']:.2f}"
            if span is not None:
                shown += f" ({span.low:.2f} … {span.high:.2f})"
            alone = f"{one['operations']:.2f}" if "operations" in one else ""
            parts.append(
                f"| {row['factor']} | {WHAT[quantity]} | {shown} | {one['expected']:.2f} "
                f"| {abs(one['slope'] - one['expected']):.2f} | {'✔' if one['near'] else '✗'} | {alone} |"
            )
    for row in found["factors"]:
        parts += ["", *_points(row)]
    return "\n".join([*parts, ""])


def _points(row: Mapping[str, Any]) -> list[str]:
    factor, times = row["factor"], row["times"]
    same = ", ".join(f"{k} {v:,}" for k, v in row["sizes"][0].items() if k != factor)
    heads = "| | " + " | ".join(f"{value:,}" for value in row["values"]) + " |"
    parts = [
        f"## {factor.capitalize()}",
        "",
        f"![{factor}](growth-{factor}.svg)",
        "",
        f"{same}. Best product {times['operations'] / 1e9:.0f} GFLOP/s, sum of two tensors {times['bytes'] / 1e9:.1f} "
        f"GB/s, calls of a block {1e3 * times['calls']:.1f} ms; other processes took "
        f"{times['others'].text(0, 100)} % of the CPU time.",
        "",
        heads,
        f"|---|{'---|' * len(row['values'])}",
    ]
    for quantity, one in row["quantities"].items():
        digits, unit = (3, "s") if quantity == "seconds" else (1, "MB")
        for name in ("measured", "theory"):
            cells = " | ".join(f"{value:.{digits}f}" for value in one[name])
            parts.append(f"| {WHAT[quantity]}, {unit}, {name} | {cells} |")
    return parts


def picture(row: Mapping[str, Any]) -> str:
    """Lines of all quantities of a factor, each over its value at the first point."""
    series = {}
    for quantity, one in row["quantities"].items():
        for name in ("measured", "theory"):
            first = one[name][0]
            series[f"{WHAT[quantity]}, {name}"] = [
                (value, y / first) for value, y in zip(row["values"], one[name], strict=True)
            ]
    return lines(series, above="times its value at the first point", below=row["factor"], room=230)


def write(found: Mapping[str, Any], folder: Path) -> None:
    """JSON, Markdown and a picture of each factor."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, default=asdict)
    (folder / "growth.json").write_text(text + "\n", encoding="utf-8")
    (folder / "growth.md").write_text(table(found), encoding="utf-8")
    for row in found["factors"]:
        (folder / f"growth-{row['factor']}.svg").write_text(picture(row), encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Measure, and write the tables and pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks growth", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the measured ones")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--patience", type=float, default=10, help="seconds a round waits for other processes"
    )
    parser.add_argument("--only", nargs="+", choices=tuple(FACTORS), default=tuple(FACTORS))
    parser.add_argument("--quick", action="store_true", help="tiny and short; says nothing")
    parser.add_argument("--out", type=Path, default=core.ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    factors = FACTORS
    if options.quick:
        factors, options.rounds, options.patience = TINY, 1, 0.0
    found: dict[str, Any] = {"commit": commit(), "machine": machine(), "factors": []}
    found |= {"threads": options.threads, "rounds": options.rounds}
    for factor in options.only:
        base, values = factors[factor]
        print(f"{factor}: {', '.join(f'{value:,}' for value in values)}", flush=True)
        found["factors"].append(measured(factor, points(base, factor, values), options))
        write(found, options.out)  # what is done stays, whatever comes next
    print(table(found))
    return 0
