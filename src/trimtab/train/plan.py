"""What a run will need, before it starts: trained parameters, tokens, peak memory and time on this machine.

Nothing is guessed from tables. The base is loaded, the adapter attached, the data tokenised, and a few real steps
are computed: the one with the most tokens, the one with the longest example, and some at random. Time per token
and the peak of memory are what those show; held-out measurements are timed the same way on a few examples.
Nothing stays on disk but the cache of tokens.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from trimtab.data import CorpusFeed, Datum
from trimtab.engine import Engine, SamplingParams
from trimtab.evals import answer, held_out, questions, some
from trimtab.models.load import Base
from trimtab.train import facts
from trimtab.train.recipe import Recipe
from trimtab.train.setup import Rows, opened_base, plan_rows, resolved, saves, total_steps
from trimtab.train.sources import Sources, read_sources
from trimtab.train.unrelated import Unrelated

PROBES = 4
"""Steps at random that are timed, beside the heaviest."""
ENOUGH = 30.0
"""Seconds of timed steps after which no more are taken."""
ASKED, SAID = 16, 8
"""Questions and tokens of an answer that are timed."""


@dataclass(frozen=True)
class Plan:
    """``rows`` are the facts of the run by name; times are in seconds, memory in bytes."""

    rows: Rows
    steps: int
    tokens: int
    trained: int
    training: float
    measuring: float
    saving: float
    peak: int
    available: int | None

    @property
    def seconds(self) -> float:
        return self.training + self.measuring + self.saving

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available


def plan(recipe: Recipe) -> Plan:
    """Predict a run of ``recipe`` here. Takes a few of its steps.

    Raises:
        TrimtabError: whatever would stop the run before its first step.
    """
    recipe, base, adapter = opened_base(recipe)
    engine = Engine(base, micro_tokens=recipe.batch.micro_tokens, memory=recipe.memory)
    whole = resolved(recipe, base, adapter, None)
    sources = read_sources(whole, base.tokenizer, engine.context(adapter.name))
    total = total_steps(whole, sources)
    probe = _Probe(whole, base, engine, adapter.name)
    rate, tokens = probe.steps(sources, total)
    measuring = probe.measuring(sources, total) + probe.unrelated(adapter.name)
    return Plan(
        rows=plan_rows(whole, base, adapter, sources, total=total),
        steps=total,
        tokens=tokens,
        trained=adapter.count,
        training=tokens * rate,
        measuring=measuring,
        saving=probe.saving(sources, total),
        peak=facts.peak_memory(base.model.device),
        available=facts.whole_memory(base.model.device),
    )


class _Probe:
    """Times parts of a run."""

    def __init__(self, recipe: Recipe, base: Base, engine: Engine, name: str) -> None:
        self.recipe, self.base, self.engine, self.name = recipe, base, engine, name

    def steps(self, sources: Sources, total: int) -> tuple[float, int]:
        """(seconds per token, tokens of all steps)."""
        feed = sources.feed
        if isinstance(feed, CorpusFeed):
            plan = feed.epoch(0)
            sizes = [sum(int(feed.corpus.lengths[i]) for i in chosen) for chosen in plan]
            longest = [max(int(feed.corpus.lengths[i]) for i in chosen) for chosen in plan]
            heavy = {sizes.index(max(sizes)), longest.index(max(longest))}
            draw = random.Random(0)
            chosen = [*heavy, *draw.sample(range(len(plan)), min(PROBES, len(plan)))]
            groups = [[feed.corpus[index] for index in plan[place]] for place in chosen]
            tokens = round(sum(sizes) / len(sizes) * total)
        else:
            groups = [members for members, _ in islice(feed.steps(1), PROBES + 2)]
            tokens = round(sum(map(_size, groups)) / len(groups) * total)
        self._step(groups[0])  # the first one also pays for what later ones find ready
        seconds, seen = 0.0, 0
        for members in groups:
            seconds += self._step(members)
            seen += _size(members)
            if seconds > ENOUGH:
                break
        return seconds / seen, tokens

    def _step(self, members: Sequence[Datum]) -> float:
        began = time.perf_counter()
        self.engine.micro_tokens = max(self.recipe.batch.micro_tokens, *map(len, members))
        self.engine.forward_backward(members, self.name)
        optim = self.recipe.optim
        self.engine.optim_step(self.name, optim.params(optim.lr or 1e-9))
        self._wait()
        return time.perf_counter() - began

    def measuring(self, sources: Sources, total: int) -> float:
        """Seconds of all held-out measurements."""
        recipe, data = self.recipe.eval, sources.held_out
        if not len(data):
            return 0.0
        sizes = [len(datum) for datum in data]
        some = random.Random(0).sample(range(len(data)), min(4 * ASKED, len(data)))
        began = time.perf_counter()
        held_out(self.engine, [data[place] for place in some], None)
        self._wait()
        loss = (time.perf_counter() - began) * sum(sizes) / sum(sizes[place] for place in some)
        middle = 0 if recipe.every is None else (total - 1) // recipe.every
        losses = 2 + middle + (self.recipe.checkpoint.final == "best")
        asked = 2 + (middle if recipe.midway == "answers" else 0)
        return losses * loss + asked * self._answers(data)

    def saving(self, sources: Sources, total: int) -> float:
        """Seconds of writing all checkpoints, and the adapter at the end."""
        times = saves(self.recipe, total, measured=bool(len(sources.held_out)))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            self.engine.save(self.name, Path(folder) / "step-000001")
        return (time.perf_counter() - began) * (times + 1)

    def unrelated(self, adapter: str) -> float:
        """Seconds of measuring the unrelated text, before and after."""
        text = Unrelated(self.engine, self.base.tokenizer, self.recipe.eval.forgetting, adapter)
        some = text.data[:2]
        if not some:
            return 0.0
        began = time.perf_counter()
        held_out(self.engine, some, None)
        self._wait()
        return 2 * (time.perf_counter() - began) * _size(text.data) / _size(some)

    def _answers(self, data: Sequence[Datum]) -> float:
        """Seconds of asking once for all answers of the recipe."""
        recipe = self.recipe.eval
        count = len(data) if recipe.asks else recipe.samples
        count = min(count, recipe.limit or count, len(data))
        if count == 0:
            return 0.0
        asked = questions(some(data, count), self.base.tokenizer, self.engine.labels)
        if self.engine.labels:
            began = time.perf_counter()
            answer(self.engine, asked[:ASKED], self.name)
            self._wait()
            return (time.perf_counter() - began) * count / len(asked[:ASKED])
        most = recipe.max_tokens or max(question.length for question in asked)
        prompts = [question.prompt for question in asked[:ASKED]]
        said = min(most, SAID)
        one = self._timed(prompts, 1)
        all_of_them = self._timed(prompts, said) if said > 1 else one
        each = (all_of_them - one) / max(said - 1, 1)
        return (one + each * (most - 1)) * count / len(prompts)

    def _timed(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        began = time.perf_counter()
        self.engine.sample(prompts, SamplingParams(max_tokens=tokens, temperature=0), self.name)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.base.model.device.type == "cuda":
            torch.cuda.synchronize(self.base.model.device)


def _size(members: Sequence[Datum]) -> int:
    return sum(len(datum) for datum in members)
