"""What a run will need, before it starts: trained parameters, tokens, peak memory and time.

Memory is predicted from the config alone, part by part (`trimtab.train.footprint`), for this machine or for a GPU that
is elsewhere. Where a run would not fit, settings are proposed with which it does.

Time on this machine is measured, where the run fits: the base is loaded and a few real steps are computed, the one
with the most tokens, the one with the longest example, and some at random; held-out measurements are timed the same
way on a few examples. Elsewhere, and for a run that does not fit, it is the count of operations over a share of the
device's rate, which is a guess, and says so.

Nothing stays on disk but the cache of tokens.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from trimtab.data import CorpusFeed, Datum
from trimtab.engine import Engine, SamplingParams
from trimtab.evals import answer, held_out, questions, some
from trimtab.models.load import Base, default_dtype
from trimtab.train.devices import (
    CPU_SHARE,
    GPU_SHARE,
    Device,
    named_gpu,
    reached,
    this_device,
)
from trimtab.train.footprint import Footprint, footprint, losses
from trimtab.train.ledger import Moment
from trimtab.train.proposal import Proposal, proposed
from trimtab.train.recipe import Recipe
from trimtab.train.setup import Rows, opened_base, resolved, saves, total_steps
from trimtab.train.sources import Sources, read_sources
from trimtab.train.unrelated import Unrelated

PROBES = 4
"""Steps at random that are timed, beside the heaviest."""
ENOUGH = 30.0
"""Seconds of timed steps after which no more are taken."""
ASKED, SAID = 16, 8
"""Questions and tokens of an answer that are timed."""


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a run; ``how`` says what they come from."""

    training: float
    measuring: float
    saving: float
    how: str

    @property
    def total(self) -> float:
        return self.training + self.measuring + self.saving


@dataclass(frozen=True)
class Plan:
    """``rows`` are the facts of the run by name, memory is in bytes.

    ``parts`` are those of the peak, which comes in ``phase``; ``phases`` are the heaviest moments of all phases,
    without what the device adds. ``times`` is None where the rate of the device is not known.
    """

    rows: Rows
    steps: int
    tokens: int
    trained: int
    device: str
    phase: str
    parts: Mapping[str, int]
    phases: Mapping[str, Moment]
    flops: float
    available: int | None
    times: Times | None
    proposal: Proposal | None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available


def plan(recipe: Recipe, gpu: str | None = None, *, dry: bool = False) -> Plan:
    """Predict a run of ``recipe`` on this machine, or on a GPU named by its name or memory.

    ``dry`` takes no real step: time then comes from the count of operations here too.

    Raises:
        UnknownNameError: no such GPU.
        TrimtabError: whatever would stop the run before its first step.
    """
    here = torch.device(recipe.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    device = this_device(here) if gpu is None else named_gpu(gpu)
    if gpu is None:
        recipe.memory.check(here.type)
    if gpu is not None:
        recipe = recipe.replace(dtype=recipe.dtype or "bfloat16", device="cpu")
    found = footprint(recipe, device)
    device = device.settled()
    phase, parts = found.peak(device)
    fits = device.memory is None or sum(parts.values()) <= device.memory
    if gpu is None and fits and not dry:
        times: Times | None = measured(recipe)
    else:
        times = counted(found, device, None if gpu is not None else here)
    return Plan(
        rows=found.rows,
        steps=found.steps,
        tokens=found.tokens,
        trained=found.trained,
        device=device.name,
        phase=phase,
        parts=parts,
        phases=found.moments,
        flops=sum(found.flops),
        available=device.memory,
        times=times,
        proposal=None if fits else proposed(recipe, device, found),
    )


def counted(found: Footprint, device: Device, here: torch.device | None) -> Times | None:
    """Times from the count of operations; None where the device's rate is not known."""
    if here is not None:
        rate, share = reached(default_dtype(here), here), CPU_SHARE
        source = f"the {rate / 1e12:.2g} TFLOP/s that products reach here (measured)"
    elif device.rate is not None:
        rate, share = device.rate, GPU_SHARE
        source = f"its published {rate / 1e12:.0f} TFLOP/s"
    else:
        return None
    training, measuring = (flops / (rate * share) for flops in found.flops)
    return Times(training, measuring, 0.0, f"operations at {share:.0%} (a guess) of {source}")


def measured(recipe: Recipe) -> Times:
    """Times from a few real steps and measurements here."""
    recipe, base, adapter = opened_base(recipe)
    engine = Engine(base, micro_tokens=recipe.batch.micro_tokens, memory=recipe.memory)
    whole = resolved(recipe, base, adapter, None)
    sources = read_sources(whole, base.tokenizer, engine.context(adapter.name))
    total = total_steps(whole, sources)
    probe = _Probe(whole, base, engine, adapter.name)
    rate, tokens = probe.steps(sources, total)
    measuring = probe.measuring(sources, total) + probe.unrelated(adapter.name)
    return Times(tokens * rate, measuring, probe.saving(sources, total), "a few real steps here")


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
        self.engine.forward_backward(members, self.name, self.recipe.loss)
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
        asked = 2 + (middle if recipe.midway == "answers" else 0)
        return losses(self.recipe, total) * loss + asked * self._answers(data)

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
