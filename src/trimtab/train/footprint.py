"""The memory that a recipe needs, found without the weights and without taking that memory.

The base is built from its config without values (`trimtab.train.hollow`), stored and adapted as the recipe says, and
the engine takes two steps on the heaviest micro-batch of the data, measures and answers. What was alive at the
heaviest moment of each phase, and what for, is the `Footprint`. It is exact for any method and model, but for what no
operation shows: libraries, the allocator's loss, the workspace of a kernel. Those are the device's
(`trimtab.train.devices`).

Taken as true without a look: that the output head is a plain linear layer where the config does not say otherwise,
that positions keep packed documents apart, and that a router gives its experts equal work.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.initial import DEFAULT, initialisation, inits
from trimtab.adapt.parse import method_from
from trimtab.data import Corpus, CorpusFeed, Datum
from trimtab.engine import Engine, SamplingParams
from trimtab.engine.micro import Micro
from trimtab.evals import questions, some
from trimtab.frozen.lowbit import LowBit
from trimtab.models.load import Base, load_hollow
from trimtab.train.devices import Device
from trimtab.train.hollow import Hollow
from trimtab.train.ledger import Ledger, Moment
from trimtab.train.recipe import Recipe
from trimtab.train.setup import Rows, opened_base, plan_rows, resolved, shown_method, total_steps
from trimtab.train.sources import Sources, read_sources
from trimtab.train.unrelated import Unrelated

PASSES = 2
"""Steps that are taken: the optimiser's state comes with the first, so that the second needs most."""
LOOKED_AT = 6
"""Steps at random among which the heaviest micro-batch is looked for, beside the largest, the longest and the one with
most padding."""


@dataclass(frozen=True)
class Footprint:
    """``moments`` are the heaviest moments of the phases. ``cells`` are the tokens, with padding, of the micro-batch
    that was trained on; ``longest`` is the longest example, ``tokens`` are those of all steps of the run, and
    ``measured`` those of all measurements of a loss; ``file`` are the bytes of dense weights that were rounded."""

    moments: Mapping[str, Moment]
    cells: int
    longest: int
    steps: int
    tokens: int
    measured: int
    trained: int
    file: int
    rows: Rows

    def peak(self, device: Device) -> tuple[str, dict[str, int]]:
        """The phase that needs most on a device, and its bytes by part."""
        name = max(self.moments, key=lambda phase: device.needs(self.moments[phase]))
        mapped = {"file": self.file} if device.maps else {}
        return name, {**device.parts(self.moments[name]), **mapped}

    def needs(self, device: Device) -> int:
        """Bytes of the peak on a device."""
        return sum(self.peak(device)[1].values())

    @property
    def flops(self) -> tuple[float, float]:
        """Floating-point operations of all steps, and of all measurements of a loss."""
        step, measure = self.moments["training"], self.moments.get("measuring")
        forward = 0 if measure is None or not measure.cells else measure.flops / measure.cells
        return step.flops / step.cells * self.tokens, forward * self.measured


def footprint(recipe: Recipe, device: Device | None = None) -> Footprint:
    """The memory of a run of ``recipe`` on a device (else on some CPU), by phase and part.

    Raises:
        TrimtabError: whatever would stop the run before its first step.
    """
    bare: list[Tensor] = []

    def loader(*args: Any, **options: Any) -> Base:
        base = load_hollow(*args, **options)
        bare.extend([*base.model.parameters(), *base.model.buffers()])
        return base

    method = method_from(recipe.method).to_dict()
    plain = recipe.replace(method=_without_data(method))
    plain, base, adapter = opened_base(plain, loader)
    account = Ledger(int(base.model.config.get_text_config().vocab_size))
    account.hold([*base.model.parameters(), *base.model.buffers()], "adapter")
    account.hold(bare, "weights")
    with Hollow(account):
        kind = "cpu" if device is None else device.kind
        run = _Run(plain, base, adapter, account, kind)
        found = run.go("no device" if device is None else device.name)
    shown = shown_method(method_from(method))
    rows = [(name, shown if name == "method" else text) for name, text in found.rows]
    return found if method == plain.method else replace(found, rows=rows)


def _without_data(method: Any) -> Any:
    """A method's fields, begun in its own way where it would begin from data or from weights: here are none of either,
    and the sizes are the same."""
    if isinstance(method, list | tuple):
        return [_without_data(part) for part in method]
    if not isinstance(method, Mapping):
        return method
    fields = {name: _without_data(value) for name, value in method.items()}
    text = str(fields.get("init", DEFAULT))
    start = initialisation(text) if text.partition("(")[0] in inits.names() else None
    if start is not None and start.observes(1) is not None:
        fields["init"] = DEFAULT
    return fields


class _Run:
    """What a run does, once each."""

    def __init__(
        self, recipe: Recipe, base: Base, adapter: Adapter, account: Ledger, kind: str
    ) -> None:
        self.base, self.adapter, self.account = base, adapter, account
        account.phase("looking")
        memory = recipe.memory
        if memory.optimiser == "paged":  # which makes room as moments on the host do
            memory = memory.replace(optimiser="host")
        tokens = recipe.batch.micro_tokens
        self.engine = Engine(base, micro_tokens=tokens, memory=memory, device=kind)
        self.recipe = resolved(recipe, base, adapter, None)
        context = self.engine.context(adapter.name)
        self.sources: Sources = read_sources(self.recipe, base.tokenizer, context)
        self.total = total_steps(self.recipe, self.sources)

    def go(self, place: str) -> Footprint:
        micro, members, tokens = self._heaviest()
        for _ in range(PASSES):
            self._step(micro, members)
        measured = self._measure()
        corpus = self.sources.sample
        lengths = corpus.lengths.tolist() if isinstance(corpus, Corpus) else map(len, corpus)
        return Footprint(
            moments=self.account.moments(),
            cells=micro.batch.input_ids.numel(),
            longest=int(max(lengths)),
            steps=self.total,
            tokens=round(tokens * self.total),
            measured=measured * losses(self.recipe, self.total),
            trained=self.adapter.count,
            file=_rounded(self.base),
            rows=plan_rows(
                self.recipe, self.base, self.adapter, self.sources, total=self.total, place=place
            ),
        )

    def _step(self, micro: Micro, members: Sequence[Datum]) -> None:
        """Forward, backward and the optimiser's step on one micro-batch."""
        engine, name, account = self.engine, self.adapter.name, self.account
        account.phase("training", micro.batch.input_ids.numel())
        engine.micro_tokens = max(engine.micro_tokens, *map(len, members))
        engine.packed = micro.packed
        engine.forward_backward(members, name, self.recipe.loss)
        trained = [t for t in self.adapter.tensors.values() if isinstance(t, nn.Parameter)]
        account.hold([t.grad for t in trained], "gradients")
        optim = self.recipe.optim
        engine.optim_step(name, optim.params(optim.lr or 1e-9, self.total))
        moments = engine.optimiser_tensors(name)
        account.hold([t for t in moments if t.is_meta], "optimiser")  # others wait on the host
        engine.packed = None

    def _measure(self) -> int:
        """The held-out loss, the unrelated text, and answers; the tokens of one measurement of the loss."""
        engine, recipe, account = self.engine, self.recipe, self.account
        data, name = self.sources.held_out, self.adapter.name
        engine.micro_tokens = recipe.batch.micro_tokens
        unrelated = Unrelated(engine, self.base.tokenizer, recipe.eval.forgetting, name)
        for texts in (data, unrelated.data):
            if len(texts):
                longest = sorted(texts, key=len, reverse=True)[:64]
                engine.micro_tokens = max(recipe.batch.micro_tokens, len(longest[0]))
                micro = next(iter(engine.micro_batches(longest, name)))
                account.phase("measuring", micro.batch.input_ids.numel())
                engine.forward([longest[place] for place in micro.members], name)
        count = len(data) if recipe.eval.asks else recipe.eval.samples
        count = min(count, recipe.eval.limit or count, len(data))
        if count and not engine.labels:
            account.phase("answering")
            self._answer(data, count)
        return sum(map(len, data))

    def _answer(self, data: Sequence[Datum], count: int) -> None:
        """The last tokens of the longest batch of answers."""
        asked = questions(some(data, count), self.base.tokenizer)
        most = self.recipe.eval.max_tokens or max(question.length for question in asked)
        longest = max(len(question.prompt) for question in asked) + most
        longest = min(longest, self.engine.context(self.adapter.name) or longest)
        rows = max(min(len(asked), self.engine.sample_tokens // longest), 1)
        prompt = [1] * max(longest - 2, 1)
        params = SamplingParams(max_tokens=2, temperature=0)
        self.engine.sample([prompt] * rows, params, self.adapter.name)

    def _heaviest(self) -> tuple[Micro, list[Datum], float]:
        """The heaviest micro-batch with its examples; and the mean tokens of a step."""
        engine, least = self.engine, self.recipe.batch.micro_tokens
        found: list[tuple[Micro, list[Datum]]] = []
        groups, mean = _groups(self.sources, self.total)
        for members in groups:
            engine.micro_tokens = max(least, *map(len, members))
            micros = engine.micro_batches(members, self.adapter.name)
            found += [(micro, [members[place] for place in micro.members]) for micro in micros]
        micro, members = max(found, key=lambda pair: pair[0].batch.input_ids.numel())
        return micro, members, mean


def _rounded(base: Base) -> int:
    """Bytes of the dense weights that were read and rounded."""
    count = sum(m.weights for m in base.model.modules() if isinstance(m, LowBit))
    return count * base.model.dtype.itemsize


def losses(recipe: Recipe, total: int) -> int:
    """How often a run measures its held-out loss."""
    middle = 0 if recipe.eval.every is None else (total - 1) // recipe.eval.every
    return 2 + middle + (recipe.checkpoint.final == "best")


def _groups(sources: Sources, total: int) -> tuple[list[list[Datum]], float]:
    """The examples of some steps, the heaviest by three measures among them; and the mean tokens of a step."""
    feed = sources.feed
    if not isinstance(feed, CorpusFeed):
        groups = [members for members, _ in islice(feed.steps(1), LOOKED_AT + 2)]
        return groups, sum(sum(map(len, members)) for members in groups) / len(groups)
    plan = feed.epoch(0)
    sizes = [sum(int(feed.corpus.lengths[i]) for i in chosen) for chosen in plan]
    longest = [max(int(feed.corpus.lengths[i]) for i in chosen) for chosen in plan]
    padded = [len(chosen) * most for chosen, most in zip(plan, longest, strict=True)]
    places = [each.index(max(each)) for each in (sizes, longest, padded)]
    places += random.Random(0).sample(range(len(plan)), min(LOOKED_AT, len(plan)))
    groups = [[feed.corpus[i] for i in plan[place]] for place in dict.fromkeys(places)]
    return groups, sum(sizes) / len(sizes)
