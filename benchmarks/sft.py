"""Chats of mixed lengths, answers only in the loss: Trimtab beside TRL's `SFTTrainer` with `peft`.

    Trimtab          what a step of `trimtab.train` is: Engine.forward_backward and Engine.optim_step, on examples
                     that trimtab.data reads and masks
    trl              SFTTrainer(model, SFTConfig(…), peft_config=LoraConfig(…)) with its defaults: batches of 8, padded
                     to their longest, bf16 by autocast, gradient checkpointing on, loss on the completion
    trl, kept        the same with gradient_checkpointing=False

Same rows in the same order, same initial factors (B zero), same number of optimiser steps, AdamW and learning rates
(linear to zero, gradients clipped at 1). TRL gets the base in bf16 (`--peer-dtype`: its own default is float32, which
takes more memory). Each side trains once through the same rows, a few optimiser steps at a time by turns, each in a
process of its own. What they learnt is measured by one yardstick: both adapters, saved, in one plain loop of
transformers with PEFT in float32, over the answers of held-out rows.

    python -m benchmarks sft
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import core, runs, steps
from benchmarks.bars import bars
from benchmarks.core import Sample, Side, Spread

OURS, PEER, KEPT = "trimtab", "trl", "trl, kept"
PEERS = (PEER, KEPT)
ADAPTER = "default"
YARDSTICK = "yardstick"
NOTES = (
    "rows of Stanford Alpaca's kind (LLaMA-Factory's alpaca_en_demo), one turn each, as chats with the model's "
    "template: about 50 to 750 tokens, 200 in the mean",
    "examples/s: median of the rounds; ratios are medians of the ratios within each round, in which all sides see the "
    "same examples; `whole run` is all counted rounds together",
    "peak memory: highest high-water mark of the whole process's resident memory in any step (weights, adapter, "
    "optimiser, activations, libraries, what the allocator keeps)",
    "held-out loss: nats a token of the answers, each with its end of turn; 95 % intervals over rows, those of the "
    "difference paired",
    "TRL also learns the line break that the template puts behind an answer, one token an example; it counts in no "
    "measure",
    "reading, rendering and tokenising come before the first step on all sides; nothing is saved or evaluated between "
    "steps",
)


@dataclass(frozen=True)
class Work:
    """What a run is. ``data`` is a JSON file of rows {instruction, input, output}; None are the real ones."""

    model: str
    data: str | None
    turns: int
    """Of a run; each has ``steps`` optimiser steps of ``batch`` examples."""
    steps: int = 1
    batch: int = 8
    held_out: int = 64
    rank: int = 16
    lr: float = 5e-4
    seed: int = 0
    peer_dtype: str = "bfloat16"

    @property
    def total(self) -> int:
        """Optimiser steps of a run."""
        return self.turns * self.steps

    def chats(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(learnt, held out) as {prompt, completion} of messages, no text twice, in the order of a hash."""
        from recipes import assets

        found = json.loads(Path(self.data).read_text("utf-8")) if self.data else assets.alpaca()
        by_text = {assets.normal(row["instruction"] + " " + row["input"]): row for row in found}
        order = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
        rows = [_chat(by_text[text]) for text in order]
        count = self.total * self.batch
        if len(rows) < self.held_out + count:
            raise core.SideError(
                f"{len(rows)} rows are too few for {count} + {self.held_out} held out."
            )
        return rows[self.held_out : self.held_out + count], rows[: self.held_out]


def _chat(row: Mapping[str, str]) -> dict[str, Any]:
    asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


# -- the sides ---------------------------------------------------------------------------------------


class Trimtab(runs.Learns):
    """Our side: the reading and the verbs that `trimtab.train` is made of."""

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.data import ExampleConfig, PythonRows, Renderer, load_examples
        from trimtab.engine import Engine

        runs.one_pool()
        self.work = work = Work(**options)
        base = tt.load(work.model, dtype=torch.bfloat16, device="cpu")
        self.model = base.model
        method = tt.LoRA(rank=work.rank, alpha=2.0 * work.rank)
        self.adapter = tt.attach(base.model, method, name=ADAPTER)
        runs.fill(base.model, work.seed)
        self.engine = Engine(base)
        learnt = [{"messages": row["prompt"] + row["completion"]} for row in work.chats()[0]]
        config = ExampleConfig(context=self.engine.context(ADAPTER))
        self.data = load_examples(PythonRows(learnt), Renderer(base.tokenizer), config)
        self.kept = runs.Kept(base.model)

    def facts(self) -> dict[str, Any]:
        """Sizes, and what is learnt."""
        head = self.model.get_output_embeddings().weight
        learnt = sum(sum(datum.weights) for datum in self.data)
        return {**runs.size(self.model, head.numel()), "learnt": int(learnt)}


class Trl:
    """The peer's side, as its user writes it."""

    def __init__(self, checkpointing: bool, scratch: str, **options: Any) -> None:
        runs.one_pool()
        runs.quiet()
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        disable_progress_bars()
        self.work = work = Work(**options)
        arguments = SFTConfig(
            output_dir=scratch, max_steps=work.total, per_device_train_batch_size=work.batch,
            learning_rate=work.lr, seed=work.seed, model_init_kwargs={"dtype": work.peer_dtype},
            train_sampling_strategy="sequential",  # the order that both sides have
            # what its logs and files would cost, the other side does not do either
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True,
            gradient_checkpointing=checkpointing,  # True is its default
        )  # fmt: skip
        self.trainer = SFTTrainer(
            model=work.model,
            args=arguments,
            train_dataset=Dataset.from_list(work.chats()[0]),
            peft_config=LoraConfig(
                r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip
        runs.fill(self.trainer.model, work.seed)
        self.kept = runs.Kept(self.trainer.model)
        self.paced = runs.Paced(self.trainer, work.steps, self.kept.take)
        self.lengths = [len(row) for row in self.trainer.train_dataset["input_ids"]]
        self.done = 0

    def facts(self) -> dict[str, Any]:
        """Sizes, and what is learnt."""
        head = self.trainer.model.get_output_embeddings().weight
        learnt = sum(v != -100 for row in self.trainer.train_dataset["labels"] for v in row)
        return {**runs.size(self.trainer.model, head.numel()), "learnt": int(learnt)}

    def step(self, number: int) -> dict[str, Any]:
        losses = self.paced.turn()
        units = self.work.steps * self.work.batch
        start = self.done % len(self.lengths)
        self.done += units
        return {
            "units": units,
            "tokens": sum(self.lengths[start : start + units]),
            "losses": losses,
        }

    def save(self, folder: str) -> None:
        """What was learnt by the end of the run."""
        self.kept.put_back()
        self.trainer.model.save_pretrained(folder)


class Yardstick:
    """The loss of held-out answers by transformers and PEFT alone, one row at a time, in float32."""

    def __init__(self, **options: Any) -> None:
        from transformers import AutoTokenizer

        self.work = Work(**options)
        tokenizer = AutoTokenizer.from_pretrained(self.work.model)
        self.rows = [answered(tokenizer, row) for row in self.work.chats()[1]]

    @torch.no_grad()
    def measure(self, folder: str | None) -> dict[str, list[float]]:
        """For each row the sum of −log p over its answer's tokens, and their number."""
        runs.quiet()
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.work.model, dtype=torch.float32)
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        model.eval()
        sums = []
        for ids, start in self.rows:
            logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float()
            nll = torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[start:]), reduction="sum"
            )
            sums.append(float(nll))  # fmt: skip
        return {"sums": sums, "tokens": [float(len(ids) - start) for ids, start in self.rows]}


def answered(tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], int]:
    """The ids of a chat to the end of its answer's turn, and where the answer begins."""

    def ids(messages: Any, **more: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(messages, return_dict=False, **more)
        return found

    whole = ids(row["prompt"] + row["completion"])
    start = len(ids(row["prompt"], add_generation_prompt=True))
    end = end_of_turn(tokenizer)
    stop = max((i + 1 for i, token in enumerate(whole) if token == end), default=len(whole))
    return whole[: stop if stop > start else None], start


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends a turn: the last behind an answer that is no white space."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    return next(token for token in reversed(whole) if tokenizer.decode([token]).strip())


# -- measuring ---------------------------------------------------------------------------------------


def sides(work: Work, scratch: str) -> list[Side]:
    """Ours and the peer's two, which may write to ``scratch``."""
    options = asdict(work)
    peer = {"scratch": scratch, **options}
    return [
        Side(OURS, f"{__name__}:Trimtab", options),
        Side(PEER, f"{__name__}:Trl", {"checkpointing": True, **peer}),
        Side(KEPT, f"{__name__}:Trl", {"checkpointing": False, **peer}),
    ]


def measure(work: Work, allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. Raises `SideError` where the sides do not learn the same."""
    folder = Path(tempfile.mkdtemp())
    try:
        with core.workers(sides(work, str(folder)), allocator, options.threads) as running:
            facts = {name: worker.call("facts") for name, worker in running.items()}
            _check(facts, work.total * work.batch)
            samples = steps.take_parts(running, options, _say)
            for number, worker in enumerate(running.values()):
                worker.call("save", str(folder / str(number)))
        ruler = Side(YARDSTICK, f"{__name__}:Yardstick", asdict(work))
        with core.workers([ruler], allocator, options.threads) as running:
            places = {"base": None, **{n: str(folder / str(i)) for i, n in enumerate(facts)}}
            held = {name: running[YARDSTICK].call("measure", at) for name, at in places.items()}
    finally:
        shutil.rmtree(folder)
    return {"allocator": allocator, **facts[OURS], **_figures(samples, held)}


def _check(facts: Mapping[str, Mapping[str, int]], examples: int) -> None:
    sizes = {(fact["trained"], fact["P"]) for fact in facts.values()}
    more = {facts[name]["learnt"] - facts[OURS]["learnt"] for name in PEERS}
    if len(sizes) != 1 or not more <= {0, examples}:  # a line break behind each answer
        raise core.SideError(f"the sides differ: {facts}")


def _figures(samples: Sequence[Sample], held: Mapping[str, Any]) -> dict[str, Any]:
    from trimtab.evals.intervals import ratio

    found: dict[str, Any] = {"sides": {}, "against": {}}
    names = (OURS, *PEERS)
    highest = {n: max(s.peak_bytes for s in samples if s.side == n) for n in names}
    total = {n: sum(s.seconds for s in core.of_side(samples, n)) for n in names}
    for name in names:
        own = core.of_side(samples, name)
        found["sides"][name] = {
            "rate": Spread.of(s.rate for s in own),
            "tokens_per_second": Spread.of(s.result["tokens"] / s.seconds for s in own),
            "peak_gb": highest[name] / 1e9,
            "cpu_share": Spread.of(s.cpu_seconds / s.seconds for s in own),
            "held_out": ratio(held[name]["sums"], held[name]["tokens"]),
        }
    for name in PEERS:
        found["against"][name] = {
            "speed": core.ratio(samples, OURS, name, lambda s: s.rate),
            "whole_run": total[name] / total[OURS],
            "memory": highest[OURS] / highest[name],
            "loss_more": runs.difference(
                held[OURS]["sums"], held[name]["sums"], held[name]["tokens"]
            ),
        }
    found["base_held_out"] = ratio(held["base"]["sums"], held["base"]["tokens"])
    found["losses"] = {
        n: [v for s in samples if s.side == n for v in s.result["losses"]] for n in names
    }
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["turns"] = 1 + max(sample.step for sample in samples)
    found["samples"] = list(samples)
    return found


def _say(sample: Sample) -> None:
    loss = sum(sample.result["losses"]) / max(len(sample.result["losses"]), 1)
    print(
        f"  round {sample.step:>2} {sample.side:<10} {sample.seconds:6.2f} s {sample.rate:6.2f} examples/s "
        f"{sample.peak_bytes / 1e9:5.2f} GB  loss {loss:.4f}  others {sample.others:4.0%}",
        flush=True,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "![examples a second, memory and held-out loss](sft.svg)",
        "",
        "| allocator | side | examples/s | tokens/s | peak memory, GB | held-out loss (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            lines.append(
                f"| {row['allocator']} | {name} | {side['rate'].text()} | {side['tokens_per_second'].text(0)} "
                f"| {side['peak_gb']:.2f} | {side['held_out']} |"
            )
        for name, found in row["against"].items():
            lines.append(
                f"| {row['allocator']} | **{OURS} over {name}** | **{found['speed'].text()}**, whole run "
                f"{found['whole_run']:.2f} | | **{found['memory']:.2f}** | difference {found['loss_more']} |"
            )
        lines.append(f"| {row['allocator']} | the base alone | | | | {row['base_held_out']} |")
    lines.append("")
    lines += [
        f"- {row['allocator']}: other processes took {row['others'].text(0, 100)} % of the CPU time in the counted "
        f"rounds; {row['turns']} rounds were done in all; {row['learnt']:,} tokens of answers learnt in a run"
        for row in rows
    ]
    return lines


def picture(row: Mapping[str, Any]) -> str:
    """One allocator's row."""
    given = row["sides"].items()
    return bars(
        {
            "examples a second (median of rounds)": {
                name: (side["rate"].median, f"{side['rate'].median:.2f}") for name, side in given
            },
            "peak memory, GB": {
                name: (side["peak_gb"], f"{side['peak_gb']:.2f}") for name, side in given
            },
            "held-out loss, nats a token": {
                "base": (row["base_held_out"].value, f"{row['base_held_out'].value:.4f}"),
                **{n: (s["held_out"].value, f"{s['held_out'].value:.4f}") for n, s in given},
            },
        },
        ours=OURS,
    )


def main(argv: Sequence[str]) -> int:
    """Measure and write the report. Raises `SideError` where the sides learn different things."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sft", description=__doc__)
    steps.add_run(parser, warmup=2, rounds=10)
    steps.add_model(parser)
    parser.add_argument("--data", help="JSON file of rows {instruction, input, output}")
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--peer-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args(argv)
    work = Work(
        steps.model_folder(options.model), options.data, options.warmup + options.rounds, options.steps,
        options.batch, options.held_out, options.rank, options.lr, peer_dtype=options.peer_dtype,
    )  # fmt: skip
    rows = steps.measured("sft", options, lambda how: measure(work, how, options))
    title = (
        f"SFT on {work.total * work.batch} chats of mixed lengths, answers only: LoRA r={work.rank} on all linear "
        f"layers of {Path(work.model).name}, bf16, {options.threads} threads, beside TRL {metadata.version('trl')}"
    )
    data = Path(work.data).name if work.data else "alpaca_en_demo"
    steps.write("sft", title, work, options, rows, table(rows), NOTES, data=data)
    (Path(options.out) / "sft.svg").write_text(picture(rows[0]), encoding="utf-8")
    return 0
