"""Answers of adapters that are only registered: does it cost anything to know a thousand of them?

    decode   tokens/s of 32 requests once all are being answered, over 32 adapters (or as many as there are) and over
             one, with 1, 32, 100 and 1,000 registered; by turns, each number in a process of its own
    first    seconds until the first token of a request, by where its adapter is when it is asked, with nobody else and
             with 31 others being answered, and the longest that the others wait for a token meanwhile
    all      every registered adapter is asked once, in random order, with slots for 64; beside as many requests for
             32 adapters

A model of the shape of SmolLM2-135M with random weights in bf16; LoRA of r=8 on q and v, as PEFT saves it.

    python -m benchmarks registered [--parts decode first all]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks import core, report, steps
from benchmarks.core import Sample, Side, Spread
from benchmarks.face_sides import smollm2_shaped
from benchmarks.many_sides import save_adapters

PARTS = ("decode", "first", "all")
PLACES = {"disk": "on disk", "host": "in host memory", "slot": "in a slot"}
"""Where an adapter is when it is asked."""
PROMPT = 16
NOTES = (
    "decode: only turns in which all rows get a token are timed; which adapters are asked is drawn anew in each round, "
    "so that those of many come from disk or host memory before the clock starts",
    "ratios are medians of the ratios within each round",
    "first: files are in the system's cache; a prompt of 16 tokens; the adapter's folder is read, its values are put "
    "into a slot, and the prompt is read",
    "slots take twice as many adapters as are answered at a time, host memory four times as many",
)


class Served:
    """One engine with so many adapters registered."""

    def __init__(
        self, folder: str, registered: int, rows: int, turns: int, sizes: Mapping[str, int]
    ) -> None:
        from trimtab.adapt.fit import Forms
        from trimtab.adapt.sources import AdapterFolder
        from trimtab.adapt.tiers import Budgets
        from trimtab.engine import Engine
        from trimtab.engine.serve.request import Words

        model: Any = smollm2_shaped(**sizes)
        one = AdapterFolder(f"{folder}/0").check(Forms(model)).nbytes
        budgets = Budgets(active=2 * rows * one, host=4 * rows * one, slots=2 * rows * one)
        room = 2 * rows * (PROMPT + turns + 64)
        self.engine = Engine(model, budgets=budgets, sample_tokens=room)
        self.engine.answering.words = Words(cast(Any, None), frozenset())
        self.names = [f"a{number}" for number in range(registered)]
        for number, name in enumerate(self.names):
            self.engine.tiers.register(name, AdapterFolder(f"{folder}/{number}"))
        self.rows, self.turns = rows, turns
        self.words = int(model.config.vocab_size)
        loop = self.engine.answering.loop
        assert loop is not None
        self.loop = loop

    def facts(self) -> dict[str, int]:
        return {"P": sum(p.numel() for p in self.engine.model.parameters()), "trained": 0}

    def ask(self, draw: random.Random, name: str, answer: int) -> Any:
        """One more request."""
        from trimtab.engine import SamplingParams

        prompt = [draw.randrange(self.words) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=answer, temperature=0)
        return self.engine.requests([prompt], params, name)[0]

    def step(self, number: int) -> dict[str, Any]:
        draw = random.Random(number)
        drawn = draw.sample(self.names, min(self.rows, len(self.names)))
        names = [drawn[row % len(drawn)] for row in range(self.rows)]
        units = 2 * self.rows * self.turns
        return {
            "units": units,
            "each": self.decode(draw, names),
            "one": self.decode(draw, names[:1] * self.rows),
        }

    def decode(self, draw: random.Random, names: Sequence[str]) -> float:
        """Tokens/s while all these are being answered."""
        requests = self.answered(draw, names)
        start = time.perf_counter()
        for _ in range(self.turns):
            self.loop.turn()
        seconds = time.perf_counter() - start
        self.ended(requests)
        return len(names) * self.turns / seconds

    def answered(self, draw: random.Random, names: Sequence[str]) -> list[Any]:
        """Requests that get a token in each turn."""
        requests = [self.ask(draw, name, self.turns + 64) for name in names]
        while not all(request.tokens for request in requests):
            self.loop.turn()
        return requests

    def ended(self, requests: Sequence[Any]) -> None:
        for request in requests:
            request.cancel()
        self.loop.finish(requests)

    def first(self, number: int, others: int) -> dict[str, float]:
        """Seconds until the first token, by where the adapter is; and of turns beside it, and without it."""
        draw = random.Random(number)
        name, *rest = draw.sample(self.names, others + 1)
        running = self.answered(draw, rest)
        found: dict[str, float] = {}
        turns = [self._turn() for _ in range(4)] if running else [0.0]
        found["turn"] = statistics.median(turns)
        kept: list[Any] = []
        for place in PLACES:
            if place == "disk":
                self.engine.tiers.lower(name, "disk")
            elif place == "host":  # where it is by now
                self.ended(kept)
                kept = []
                self.loop.seats.clear()
            start, longest = time.perf_counter(), 0.0
            request = self.ask(draw, name, self.turns + 64)
            while not request.tokens:
                longest = max(longest, self._turn())
            found[place] = time.perf_counter() - start
            found[f"{place}, longest"] = longest
            kept.append(request)
        self.ended([*running, *kept])
        return found

    def _turn(self) -> float:
        start = time.perf_counter()
        self.loop.turn()
        return time.perf_counter() - start

    def all(self, number: int, few: int) -> dict[str, float]:
        """Tokens/s of as many requests as there are adapters: one for each, or for ``few`` of them."""
        draw = random.Random(number)
        order = draw.sample(self.names, len(self.names))
        found = {}
        for what, names in (("each", order), ("few", [order[n % few] for n in range(len(order))])):
            start = time.perf_counter()
            requests = [self.ask(draw, name, 8) for name in names]
            self.loop.finish(requests)
            found[what] = 8 * len(names) / (time.perf_counter() - start)
        return found


# -- measuring ---------------------------------------------------------------------------------------


def sides(folder: Path, options: argparse.Namespace, sizes: Mapping[str, int]) -> list[Side]:
    """One for each number of registered adapters, the largest last."""
    shared = {
        "folder": str(folder),
        "rows": options.rows,
        "turns": options.turns,
        "sizes": dict(sizes),
    }
    counts = sorted(options.counts)
    return [Side(str(n), f"{__name__}:Served", {**shared, "registered": n}) for n in counts]


def decode(made: Sequence[Side], options: argparse.Namespace) -> dict[str, Any]:
    """The rates of each side, and over that of the side that has just as many as are answered."""
    with core.workers(made, "default", options.threads) as running:
        samples = steps.take_parts(running, options, _say)
    least = min(made, key=lambda side: abs(int(side.name) - options.rows)).name
    found: dict[str, Any] = {"least": least, "rates": {}}
    for side in made:
        found["rates"][side.name] = {
            what: {
                "rate": Spread.of(s.result[what] for s in core.of_side(samples, side.name)),
                "over": core.ratio(samples, side.name, least, lambda s, w=what: s.result[w]),
            }
            for what in ("each", "one")
        }
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    return {**found, "samples": samples}


def first(side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds until the first token, alone and beside others."""
    found: dict[str, Any] = {}
    with core.workers([side], "default", options.threads) as running:
        for others in (0, min(options.rows, int(side.name)) - 1):
            each = [
                running[side.name].call("first", number, others)
                for number in range(options.warmup + options.rounds)
            ][options.warmup :]
            found[str(others)] = {key: Spread.of(one[key] for one in each) for key in each[0]}
            print(
                f"  first, beside {others}: {found[str(others)]['disk'].text(1, 1e3)} ms",
                flush=True,
            )
    return found


def every(side: Side, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of a request for each adapter, and of as many for few."""
    with core.workers([side], "default", options.threads) as running:
        few = min(options.rows, int(side.name))
        each = [running[side.name].call("all", n, few) for n in range(options.rounds)]
    return {
        "few": few,
        "rates": {what: Spread.of(one[what] for one in each) for what in ("each", "few")},
        "over": Spread.of(one["each"] / one["few"] for one in each),
    }


def _say(sample: Sample) -> None:
    print(
        f"  round {sample.step:>2} {sample.side:>5} registered {sample.result['each']:7.1f} tok/s "
        f"{sample.result['one']:7.1f} tok/s for one  others {sample.others:4.0%}",
        flush=True,
    )


def table(row: Mapping[str, Any], rows: int) -> list[str]:
    """A part as Markdown."""
    if row["part"] == "decode":
        lines = [
            f"## {rows} requests", "",
            f"| registered | tokens/s, over {rows} adapters or all | over that of {row['least']} | tokens/s, over one "
            f"| over that of {row['least']} |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for count, found in row["rates"].items():
            cells = [f"{f['rate'].text(1)} | **{f['over'].text()}**" for f in found.values()]
            lines.append(f"| {count} | {' | '.join(cells)} |")
        share = row["others"].text(0, 100)
        return [
            *lines,
            "",
            f"Other processes took {share} % of the CPU time in the counted rounds.",
            "",
        ]
    if row["part"] == "first":
        lines = [
            f"## Until the first token, of {row['registered']:,} registered, ms", "",
            "| the adapter is | " + " | ".join(
                "alone" if count == "0" else f"beside {count} others | their longest turn"
                for count in row["found"]
            ) + " |",
            "|---|" + "---|" * (2 * len(row["found"]) - 1),
        ]  # fmt: skip
        for place, words in PLACES.items():
            cells = []
            for count, found in row["found"].items():
                cells.append(found[place].text(1, 1e3))
                if count != "0":
                    cells.append(found[f"{place}, longest"].text(1, 1e3))
            lines.append(f"| {words} | {' | '.join(cells)} |")
        usual = [found["turn"] for count, found in row["found"].items() if count != "0"]
        return [*lines, "", f"A turn of the others takes {usual[0].text(1, 1e3)} ms.", ""]
    return [
        f"## {row['registered']:,} requests in random order", "",
        f"One for each adapter: {row['rates']['each'].text(1)} tokens/s, 8 of each, prompts and loads included; for "
        f"{row['few']} adapters {row['rates']['few'].text(1)}. **{row['over'].text()}**", "",
    ]  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks registered", description=__doc__)
    steps.add_run(parser, warmup=1, rounds=5)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 32, 100, 1000])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=16, help="tokens that are timed")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model, to try the benchmark itself"
    )
    options = parser.parse_args(argv)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64} if options.tiny else {}  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        save_adapters(Path(place), max(options.counts), small)
        made = sides(Path(place), options, small)
        most = made[-1]
        with core.workers(made[:1], "default", options.threads) as running:
            facts = running[made[0].name].call("facts")
        if "decode" in options.parts:
            rows.append({"part": "decode", **decode(made, options)})
        if "first" in options.parts:
            rows.append(
                {"part": "first", "registered": int(most.name), "found": first(most, options)}
            )
        if "all" in options.parts:
            rows.append({"part": "all", "registered": int(most.name), **every(most, options)})
    about = {
        key: getattr(options, key)
        for key in ("rows", "turns", "counts", "threads", "warmup", "rounds")
    }
    lines = [line for row in rows for line in table(row, options.rows)]
    report.write(
        Path(options.out), "registered", "Answers of adapters that are only registered", {**about, **facts},
        rows, lines, NOTES,
    )  # fmt: skip
    return 0
