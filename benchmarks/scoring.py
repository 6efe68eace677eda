"""Log-probabilities of real texts of mixed lengths: Trimtab beside transformers with padding.

    Trimtab                  Engine.forward on all texts of a round: −log p of each text, summed
    transformers             batches of 16 as the texts come, padded to their longest, with a mask
    transformers, sorted     the same, texts sorted by length first: what a user does who knows

Same token ids, the same base in bf16 (`--dtype`) without adapters, no gradients. The peer's forward makes the logits of
all cells; cross-entropy without reduction turns them into log-probabilities. Each side scores a part of the texts in a
round, by turns, each in a process of its own; the sum of each text is compared.

    python -m benchmarks scoring
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import core, runs, steps
from benchmarks.bars import bars
from benchmarks.core import Sample, Side, Spread

OURS, PLAIN, SORTED = "trimtab", "transformers", "transformers, sorted"
PEERS = (PLAIN, SORTED)
TOLERANCE = 0.01
"""How far two bf16 computations of a round's log-probability may lie apart, relative to it."""
NOTES = (
    "texts: instructions with their answers (LLaMA-Factory's alpaca_en_demo) and sentences of film reviews "
    "(vaderSentiment), half of either, in an order by hash; each text is scored once, warm-up scores the first again",
    "texts/s: median of the rounds; ratios are medians of the ratios within each round, in which all sides score the "
    "same texts; `all` is all counted rounds together",
    "sorted: within the texts of a round, as ours are planned within them too",
    "peak memory: highest high-water mark of the whole process's resident memory in any round",
    "tokenising comes before; tokens/s are those of the texts, without padding",
)


@dataclass(frozen=True)
class Work:
    """What is scored. ``data`` is a JSON file of texts; None are the real ones."""

    model: str
    data: str | None
    texts: int = 2000
    rounds: int = 10
    batch: int = 16
    dtype: str = "bfloat16"

    def part(self, number: int, tokenizer: Any) -> list[list[int]]:
        """The token ids of the texts of round ``number``; rounds begin anew after the last."""
        chosen = self._texts()[number % self.rounds :: self.rounds]
        found: list[list[int]] = tokenizer(chosen)["input_ids"]
        return found

    def _texts(self) -> list[str]:
        from recipes import assets

        if self.data:
            whole = list(dict.fromkeys(json.loads(Path(self.data).read_text("utf-8"))))
        else:
            rows = assets.alpaca()
            long = _by_hash("\n\n".join(filter(None, row.values())) for row in rows)
            short = _by_hash(text for text, _ in assets.movie_reviews())
            half = min(self.texts // 2, len(long))
            whole = long[:half] + short[: self.texts - half]
        if len(whole) < self.texts:
            raise core.SideError(f"there are only {len(whole)} texts for {self.texts}.")
        return _by_hash(whole)[: self.texts]


def _by_hash(texts: Any) -> list[str]:
    """Each once, of two words or more, in an order that only the texts decide."""
    several = {text.strip() for text in texts if len(text.split()) > 1}
    return sorted(several, key=lambda text: hashlib.sha256(text.encode()).digest())


class _Side:
    """What the sides share."""

    work: Work
    tokenizer: Any
    model: Any

    def facts(self) -> dict[str, int]:
        head = self.model.get_output_embeddings().weight
        return runs.size(self.model, head.numel())

    def result(self, scores: list[float], ids: list[list[int]]) -> dict[str, Any]:
        return {"units": len(ids), "tokens": sum(map(len, ids)), "scores": scores}


class Trimtab(_Side):
    """Our side."""

    def __init__(self, **options: Any) -> None:
        import trimtab as tt
        from trimtab.engine import Engine

        self.work = work = Work(**options)
        base = tt.load(work.model, dtype=work.dtype, device="cpu")
        self.model, self.tokenizer = base.model, base.tokenizer
        self.engine = Engine(base)
        self.parts = [work.part(number, base.tokenizer) for number in range(work.rounds)]

    def step(self, number: int) -> dict[str, Any]:
        from trimtab.data import Datum

        ids = self.parts[number % len(self.parts)]
        found = self.engine.forward([Datum.causal(text, [1.0] * len(text)) for text in ids])
        return self.result([-value for value in found.sums], ids)


class Transformers(_Side):
    """The peer's side, as its user writes it."""

    def __init__(self, by_length: bool, **options: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.work = work = Work(**options)
        self.by_length = by_length
        self.tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="right")
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.dtype)
        self.model = model.eval().requires_grad_(False)
        self.parts = [work.part(number, self.tokenizer) for number in range(work.rounds)]

    @torch.inference_mode()
    def step(self, number: int) -> dict[str, Any]:
        ids = self.parts[number % len(self.parts)]
        scores = [0.0] * len(ids)
        for members in self._batches(ids):
            batch = self.tokenizer.pad(
                {"input_ids": [ids[index] for index in members]}, return_tensors="pt"
            )
            for index, score in zip(members, self._scores(batch).tolist(), strict=True):
                scores[index] = score
        return self.result(scores, ids)

    def _batches(self, ids: list[list[int]]) -> Iterator[list[int]]:
        order = list(range(len(ids)))
        if self.by_length:
            order.sort(key=lambda index: len(ids[index]))
        for start in range(0, len(order), self.work.batch):
            yield order[start : start + self.work.batch]

    def _scores(self, batch: Any) -> Tensor:
        """The log-probability of each row after its first token."""
        mask = batch["attention_mask"]
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=mask, use_cache=False
        ).logits[:, :-1]
        targets = batch["input_ids"][:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        nll = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, reduction="none"
        )
        return -nll.sum(1)


# -- measuring ---------------------------------------------------------------------------------------


def sides(work: Work) -> list[Side]:
    """Ours and the peer's two."""
    options = asdict(work)
    return [
        Side(OURS, f"{__name__}:Trimtab", options),
        Side(PLAIN, f"{__name__}:Transformers", {"by_length": False, **options}),
        Side(SORTED, f"{__name__}:Transformers", {"by_length": True, **options}),
    ]


def measure(work: Work, allocator: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the report. Raises `SideError` where the sides score differently."""
    with core.workers(sides(work), allocator, options.threads) as running:
        facts = {name: worker.call("facts") for name, worker in running.items()}
        if facts[OURS] != facts[PLAIN]:
            raise core.SideError(f"the sides differ in size: {facts}")
        samples = steps.take_parts(running, options, _say)
    return {"allocator": allocator, **facts[OURS], **_figures(samples)}


def _figures(samples: Sequence[Sample]) -> dict[str, Any]:
    found: dict[str, Any] = {"sides": {}, "against": {}, "apart": _apart(samples)}
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
        }
    for name in PEERS:
        found["against"][name] = {
            "speed": core.ratio(samples, OURS, name, lambda s: s.rate),
            "all": total[name] / total[OURS],
            "memory": highest[OURS] / highest[name],
        }
    found["tokens"] = sum(s.result["tokens"] for s in core.of_side(samples, OURS))
    found["others"] = Spread.of(sample.others for sample in samples if sample.counted)
    found["turns"] = 1 + max(sample.step for sample in samples)
    found["samples"] = list(samples)
    return found


def _apart(samples: Sequence[Sample]) -> dict[str, float]:
    """How far the scores lie apart: of a round's sum at most, and of one text at most, relative to it.

    Raises `SideError` where a round's is too far.
    """
    scores = {(s.side, s.step): s.result["scores"] for s in samples}
    whole, single = 0.0, 0.0
    for (side, step), ours in scores.items():
        for name in PEERS if side == OURS else ():
            peer = scores[name, step]
            whole = max(whole, abs(sum(ours) / sum(peer) - 1))
            single = max(single, *(abs(a / b - 1) for a, b in zip(ours, peer, strict=True)))
    if not whole < TOLERANCE:
        raise core.SideError(f"the scores disagree: by {whole:.3f} of a round's.")
    return {"round": whole, "text": single}


def _say(sample: Sample) -> None:
    print(
        f"  round {sample.step:>2} {sample.side:<20} {sample.seconds:6.2f} s {sample.rate:6.1f} texts/s "
        f"{sample.peak_bytes / 1e9:5.2f} GB  score {sum(sample.result['scores']):.1f}  others {sample.others:4.0%}",
        flush=True,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "![texts a second and memory](scoring.svg)",
        "",
        "| allocator | side | texts/s | tokens/s | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for name, side in row["sides"].items():
            lines.append(
                f"| {row['allocator']} | {name} | {side['rate'].text(1)} | {side['tokens_per_second'].text(0)} "
                f"| {side['peak_gb']:.2f} |"
            )
        for name, found in row["against"].items():
            lines.append(
                f"| {row['allocator']} | **{OURS} over {name}** | **{found['speed'].text()}**, all "
                f"{found['all']:.2f} | | **{found['memory']:.2f}** |"
            )
    lines.append("")
    lines += [
        f"- {row['allocator']}: {row['tokens']:,} tokens in the counted rounds; the sides' scores of a round differ by "
        f"at most {100 * row['apart']['round']:.2f} %, of one text by {100 * row['apart']['text']:.1f} %; other "
        f"processes took {row['others'].text(0, 100)} % of the CPU time; {row['turns']} rounds were done in all"
        for row in rows
    ]
    return lines


def picture(row: Mapping[str, Any]) -> str:
    """One allocator's row."""
    given = row["sides"].items()
    return bars(
        {
            "texts a second (median of rounds)": {
                name: (side["rate"].median, f"{side['rate'].median:.1f}") for name, side in given
            },
            "peak memory, GB": {
                name: (side["peak_gb"], f"{side['peak_gb']:.2f}") for name, side in given
            },
        },
        ours=OURS,
    )


def main(argv: Sequence[str]) -> int:
    """Measure and write the report. Raises `SideError` where the sides score differently."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scoring", description=__doc__)
    steps.add_run(parser, warmup=1, rounds=10)
    steps.add_model(parser)
    parser.add_argument("--data", help="JSON file of texts")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args(argv)
    # The texts of the warm-up come again as the last.
    work = Work(
        steps.model_folder(options.model), options.data, options.texts, options.rounds, options.batch,
        options.dtype,
    )  # fmt: skip
    rows = steps.measured("scoring", options, lambda how: measure(work, how, options))
    title = (
        f"Log-probabilities of {work.texts:,} texts of mixed lengths: {Path(work.model).name}, {work.dtype}, "
        f"{options.threads} threads"
    )
    data = Path(work.data).name if work.data else "alpaca_en_demo and film reviews"
    steps.write("scoring", title, work, options, rows, table(rows), NOTES, data=data)
    (Path(options.out) / "scoring.svg").write_text(picture(rows[0]), encoding="utf-8")
    return 0
