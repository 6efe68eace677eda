"""Answers for many requests at once: Trimtab beside transformers and peft.

    bare       64 requests of mixed lengths on the bare base, beside `generate` in padded batches of 16, as they come
               and sorted by length, and beside transformers' continuous batching
    adapters   32 requests, each with a LoRA of its own (r=8 on q and v), beside the same requests on the bare base in
               the same engine, `peft` with a mixed batch (``adapter_names``), and `peft` one request after another
               (``set_adapter``)
    wide       the same with r=16 on all linear layers, whose adapters together have more bytes than the base

Greedy, the same token ids and numbers of tokens on all sides, no end tokens, the base in bf16. Each side answers all
requests in a round, by turns, each in a process of its own. What all sides that decode the same say first is compared.

    python -m benchmarks serving [--parts bare adapters wide]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import core, runs, steps
from benchmarks.core import Sample, Side, Spread

PARTS = "bare", "adapters", "wide"
OURS, BASE = "trimtab", "trimtab, bare base"
PADDED, SORTED, CONTINUOUS = "generate, padded", "generate, sorted", "continuous batching"
MIXED, ONE_BY_ONE = "peft, adapter_names", "peft, set_adapter"
NOTES = (
    "tokens/s counts the tokens that were asked for; padding and tokens that a batch makes because another row goes on "
    "do not count; reading the prompts is part of the time",
    "ratios are medians of the ratios within each round; peak memory is the highest high-water mark of the whole "
    "process's resident memory in any round",
    "prompts are random tokens; adapters have random factors, so that each answers differently",
    "first tokens: the share of requests whose first token is the peer's (bf16 rounds otherwise in other batches, and "
    "random prompts leave ties)",
)


@dataclass(frozen=True)
class Work:
    """``prompts`` and ``answers`` are the least and most tokens of each; ``adapters`` is a folder of theirs, one for
    each request."""

    model: str
    requests: int
    prompts: tuple[int, int]
    answers: tuple[int, int]
    batch: int = 16
    rank: int = 8
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    adapters: str = ""

    def asked(self) -> list[tuple[list[int], int]]:
        """Prompts, and how many tokens follow."""
        draw = random.Random(7)
        return [
            ([draw.randrange(100, 40000) for _ in range(draw.randint(*self.prompts))], draw.randint(*self.answers))
            for _ in range(self.requests)
        ]  # fmt: skip

    def names(self) -> list[str]:
        return [f"a{number}" for number in range(self.requests)]


def _work(options: Mapping[str, Any]) -> Work:
    pairs = {name: tuple(options[name]) for name in ("prompts", "answers")}
    return Work(**{**options, **pairs})


class _Side:
    """What the sides share."""

    model: Any

    def facts(self) -> dict[str, int]:
        head = self.model.get_output_embeddings().weight
        return {**runs.size(self.model, head.numel()), "trained": 0}

    def result(self, said: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"units": sum(map(len, said)), "first": [tokens[0] for tokens in said]}


class Trimtab(_Side):
    """Our side; with ``adapters`` of the work, each request has its own."""

    def __init__(self, acting: bool, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine

        self.work = work = _work(options)
        base = tt.load(work.model, dtype="bfloat16", device="cpu")
        self.model = base.model
        self.names: list[str | None] = [None] * work.requests
        if acting:
            for name in work.names():
                tt.attach(base.model, tt.Adapter.load(f"{work.adapters}/{name}"), name)
            self.names = list(work.names())
        room = sum(len(prompt) + count for prompt, count in work.asked())
        self.engine = Engine(base, sample_tokens=room + 32 * work.requests)
        self.engine.answering.words = replace(self.engine.answering.words, ends=frozenset())

    def step(self, number: int) -> dict[str, Any]:
        from trimtab.engine import SamplingParams

        loop = self.engine.answering.loop
        assert loop is not None
        loop.ledger.forget()
        requests = [
            self.engine.requests([prompt], SamplingParams(max_tokens=count, temperature=0), name)[0]
            for (prompt, count), name in zip(self.work.asked(), self.names, strict=True)
        ]
        loop.finish(requests)
        return self.result([request.tokens for request in requests])


class Generate(_Side):
    """`generate` on batches padded on the left."""

    def __init__(self, by_length: bool, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.work = _work(options)
        self.by_length = by_length
        model = AutoModelForCausalLM.from_pretrained(self.work.model, dtype="bfloat16")
        self.model = model.eval().requires_grad_(False)

    def step(self, number: int) -> dict[str, Any]:
        asked = self.work.asked()
        said: list[list[int]] = [[] for _ in asked]
        for members in self._batches(asked):
            rows = _generated(
                self.model, [asked[n][0] for n in members], max(asked[n][1] for n in members)
            )
            for member, row in zip(members, rows, strict=True):
                said[member] = row[: asked[member][1]]
        return self.result(said)

    def _batches(self, asked: Sequence[tuple[list[int], int]]) -> Iterator[list[int]]:
        order = list(range(len(asked)))
        if self.by_length:
            order.sort(key=lambda n: (asked[n][1], len(asked[n][0])))
        for start in range(0, len(order), self.work.batch):
            yield order[start : start + self.work.batch]


class Continuous(Generate):
    """transformers' continuous batching, of all requests that have one number of tokens."""

    def step(self, number: int) -> dict[str, Any]:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        asked = self.work.asked()
        most = max(count for _, count in asked)
        cells = sum(len(prompt) + most for prompt, _ in asked)
        found = self.model.generate_batch(
            [prompt for prompt, _ in asked],
            generation_config=_config(most),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=cells // 32 + 2 * len(asked), max_batch_tokens=512,
                allow_block_sharing=False,
            ),
            progress_bar=False,
        )  # fmt: skip
        ordered = sorted(
            found.values(), key=lambda out: int(str(out.request_id).rpartition("_")[2])
        )
        said = [list(out.generated_tokens) for out in ordered]
        return {**self.result(said), "units": sum(count for _, count in asked)}


class Peft(_Side):
    """peft: one batch whose rows name their adapters, or one request after another."""

    def __init__(self, mixed: bool, **options: Any) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.work = work = _work(options)
        self.mixed = mixed
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype="bfloat16")
        first, *rest = work.names()
        self.model = PeftModel.from_pretrained(
            model, f"{work.adapters}/{first}", adapter_name=first
        )
        for name in rest:
            self.model.load_adapter(f"{work.adapters}/{name}", adapter_name=name)
        self.model.eval().requires_grad_(False)

    def facts(self) -> dict[str, int]:
        return {}

    def step(self, number: int) -> dict[str, Any]:
        asked, names = self.work.asked(), self.work.names()
        if self.mixed:
            most = max(count for _, count in asked)
            rows = _generated(
                self.model, [prompt for prompt, _ in asked], most, adapter_names=names
            )
            return self.result([row[:count] for row, (_, count) in zip(rows, asked, strict=True)])
        said = []
        for (prompt, count), name in zip(asked, names, strict=True):
            self.model.set_adapter(name)
            said += _generated(self.model, [prompt], count)
        return self.result(said)


def _config(count: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)


@torch.inference_mode()
def _generated(
    model: Any, prompts: Sequence[list[int]], count: int, **more: Any
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, **more,
    )  # fmt: skip
    found: list[list[int]] = out[:, width:].tolist()
    return found


# -- measuring ---------------------------------------------------------------------------------------


def sides(part: str, work: Work) -> list[Side]:
    """Those of a part, ours first."""
    options = asdict(work)

    def side(name: str, kind: str, **more: Any) -> Side:
        return Side(name, f"{__name__}:{kind}", {**more, **options})

    if part == "bare":
        return [
            side(OURS, "Trimtab", acting=False),
            side(PADDED, "Generate", by_length=False),
            side(SORTED, "Generate", by_length=True),
            side(CONTINUOUS, "Continuous", by_length=False),
        ]
    return [
        side(OURS, "Trimtab", acting=True),
        side(BASE, "Trimtab", acting=False),
        side(MIXED, "Peft", mixed=True),
        side(ONE_BY_ONE, "Peft", mixed=False),
    ]


def write_adapters(work: Work, folder: Path) -> None:
    """One for each request, with random factors, as PEFT saves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype="bfloat16")
    targets = work.targets if isinstance(work.targets, str) else list(work.targets)
    config = LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=targets)
    wrapped = get_peft_model(model, config, adapter_name=work.names()[0])
    for name in work.names()[1:]:
        wrapped.add_adapter(name, config)
    with torch.no_grad():
        for key, tensor in wrapped.named_parameters():
            if "lora_B" in key:
                tensor.normal_(std=0.2)
    wrapped.save_pretrained(folder)


def measure(part: str, work: Work, allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part of the report."""
    with tempfile.TemporaryDirectory() as folder:
        if part != "bare":
            work = replace(work, adapters=folder)
            write_adapters(work, Path(folder))
        made = sides(part, work)
        with core.workers(made, allocator, options.threads) as running:
            facts = running[OURS].call("facts")
            samples = steps.take_parts(running, options, _say)
    found: dict[str, Any] = {"part": part, "allocator": allocator, **facts, "sides": {}}
    first = {side.name: _first(samples, side.name) for side in made}
    for side in made:
        own = core.of_side(samples, side.name)
        alike = [a == b for a, b in zip(first[OURS], first[side.name], strict=True)]
        found["sides"][side.name] = {
            "rate": Spread.of(sample.rate for sample in own),
            "peak_gb": max(s.peak_bytes for s in samples if s.side == side.name) / 1e9,
            "speed": core.ratio(samples, OURS, side.name, lambda s: s.rate),
            "first": sum(alike) / len(alike),
        }
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["samples"] = list(samples)
    return found


def _first(samples: Sequence[Sample], side: str) -> list[int]:
    return list(core.of_side(samples, side)[0].result["first"])


def _say(sample: Sample) -> None:
    print(
        f"  round {sample.step:>2} {sample.side:<22} {sample.seconds:6.2f} s {sample.rate:7.1f} tok/s "
        f"{sample.peak_bytes / 1e9:5.2f} GB  others {sample.others:4.0%}",
        flush=True,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parts as Markdown."""
    lines = [
        "| part | side | tokens/s | Trimtab over it | peak memory, GB | first tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            over = "" if name == OURS else f"**{side['speed'].text()}**"
            lines.append(
                f"| {row['part']} | {name} | {side['rate'].text(1)} | {over} | {side['peak_gb']:.2f} "
                f"| {side['first']:.2f} |"
            )
    lines.append("")
    lines += [
        f"- {row['part']}: other processes took {row['others'].text(0, 100)} % of the CPU time in the counted rounds"
        for row in rows
    ]
    return lines


def main(argv: Sequence[str]) -> int:
    """Measure and write the report; parts that are not measured stay as they were."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving", description=__doc__)
    steps.add_run(parser, warmup=1, rounds=3)
    steps.add_model(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="a few short requests, to see that it runs"
    )
    options = parser.parse_args(argv)
    folder = steps.model_folder(options.model)
    works = {
        "bare": Work(folder, 64, (16, 192), (8, 48)),
        "adapters": Work(folder, 32, (16, 48), (32, 32)),
        "wide": Work(folder, 32, (16, 48), (32, 32), rank=16, targets="all-linear"),
    }
    if options.tiny:
        works = {
            name: replace(w, requests=4, prompts=(3, 9), answers=(2, 4))
            for name, w in works.items()
        }
    file = Path(options.out) / "serving.json"
    known = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    rows = [core.spreads(row) for row in known if row["part"] not in options.parts]
    for part in options.parts:
        rows += steps.measured(
            f"serving, {part}",
            options,
            lambda how, part=part: measure(part, works[part], how, options),
        )
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    title = f"Answers for many requests: {Path(folder).name}, bf16, {options.threads} threads"
    steps.write("serving", title, works["bare"], options, rows, table(rows), NOTES)
    return 0
