"""The world of a soak: one engine and its desk, tenants, a twin of each that trains alone, and who waits for what.

All is in fp64, where rounding is so small that another order of sums changes no token, and on a tiny base, so that
much happens in a minute. What is done there is in `benchmarks.soak_deeds`, what must hold in `benchmarks.soak_laws`.
"""

from __future__ import annotations

import copy
import gc
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trimtab as tt
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import bank_of, find_bank
from trimtab.adapt.parse import method_from
from trimtab.adapt.tiers import Budgets
from trimtab.engine import Engine, SamplingParams, sampling
from trimtab.engine.desk import Desk, Policy
from trimtab.engine.sampling import Completion
from trimtab.engine.serve import Loop, Request
from trimtab.engine.streaming import Stream
from trimtab.engine.tiers import tiers_of
from trimtab.models.load import Base

VOCABULARY = 272
CONTEXT = 160
TOKENS = 448
"""Positions of all pages: few, so that requests wait and are sent back."""
MICRO = 192
END = "<|end|>"
UNPAGED = "prefix(length=3, layers=[1])"
"""The method whose answers do not come from pages, but in batches, which seeds are of then."""
LARGE = Budgets(active=1 << 30, host=1 << 30)
SMALL = Budgets(active=60_000, host=60_000, slots=60_000)
"""Room for some of the adapters that only answer."""


class BrokenLawError(AssertionError):
    """Something that must hold does not."""


class OutOfLuckError(RuntimeError):
    """What a forward raises that is made to fail."""


def tiny() -> Base:
    """A small Llama of random weights that reads bytes."""
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.15, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    return Base(model, tokenizer, "tiny")


@dataclass(frozen=True, eq=False)
class Kept:
    """An adapter as it was once: its values, how far it went, and how many blocks it was left out of."""

    adapter: Adapter
    scale: float = 1.0
    dropped: int = 0

    @classmethod
    def of(cls, model: Any, name: str) -> Kept:
        """As it is now."""
        bank = bank_of(model)
        values = bank.require(name).detached()
        return cls(values, bank.scales.get(name, 1.0), bank.dropped.get(name, 0))

    @property
    def paged(self) -> bool:
        """Whether its answers come from pages."""
        return self.adapter.method != method_from(UNPAGED)

    @property
    def sick(self) -> bool:
        """Whether some of its values are no numbers."""
        return not all(t.isfinite().all() for t in self.adapter.named().values())


class Oracle:
    """Another copy of the base, on which one adapter acts at a time."""

    def __init__(self, base: Base) -> None:
        self.base = Base(copy.deepcopy(base.model), base.tokenizer, base.name)
        self.model = self.base.model

    def born(self, method: str, seed: int) -> Adapter:
        """A new adapter that does something, in fp64."""
        adapter = tt.attach(self.model, method, "new", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.model.double()
        return tt.detach(self.model, "new")

    def another(self) -> Base:
        """One more copy of the base, on which nobody acts."""
        return Base(copy.deepcopy(self.model), self.base.tokenizer, self.base.name)

    @contextmanager
    def acting(self, kept: Kept | None) -> Iterator[str | None]:
        """The name of that adapter, as it was; None for the bare base."""
        if kept is None:
            yield None
            return
        tt.attach(self.model, kept.adapter.detached(), "kept", trainable=False)
        try:
            if kept.scale != 1.0:
                tt.scale(self.model, "kept", kept.scale)
            if kept.dropped:
                tt.drop_layers(self.model, "kept", kept.dropped)
            yield "kept"
        finally:
            tt.detach(self.model, "kept")

    def answers(
        self, kept: Kept | None, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """What it answers alone: greedy, by the model's own `generate`; else by an engine where nothing else is."""
        with self.acting(kept) as name:
            if params.temperature or params.logprobs is not None or (kept and kept.sick):
                return Engine(self.base).sample(prompts, params, name)
            found = []
            for number, prompt in enumerate(prompts):
                with tt.using(self.model, name) if name else torch.no_grad():
                    (row,) = sampling.generate(self.model, self.base.tokenizer, [prompt], params, 0)
                found += [Completion(number, *row)] * params.n
            return found

    @torch.no_grad()
    def logits(self, kept: Kept | None, ids: torch.Tensor) -> torch.Tensor:
        """Of a plain forward."""
        with self.acting(kept) as name:
            if name is None:
                return self.model(ids).logits
            with tt.using(self.model, name):
                return self.model(ids).logits


@dataclass(eq=False)
class Waiting:
    """Something that was asked; ``excuses`` are the errors that may come of it, after what was done meanwhile."""

    name: str | None
    excuses: set[type[BaseException]] = field(default_factory=set)
    future: Future[Any] | None = None


@dataclass(eq=False)
class Work(Waiting):
    """Something that changes a tenant, and how its twin does the same."""

    mirror: Callable[[Engine], Any] = lambda engine: None


@dataclass(eq=False)
class Asked(Waiting):
    """Answers: of prompts, as whom (told when they begin), by requests or a stream of the caller's own, if not by the
    desk."""

    prompts: Sequence[Sequence[int]] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    kept: Kept | None = None
    requests: Sequence[Request] = ()
    stream: Stream | None = None
    pieces: list[str] = field(default_factory=list)

    def begin(self, model: Any) -> None:
        """Keep whom they are of."""
        if self.name is not None:
            self.kept = Kept.of(model, self.name)

    def done(self) -> bool:
        """Whether all of them are there."""
        if self.future is not None:
            return self.future.done()
        return self.stream is None and all(request.done for request in self.requests)

    def completions(self) -> list[Completion]:
        """What came; raises what came instead."""
        if self.future is not None:
            return list(self.future.result(timeout=0))
        return [request.completion() for request in self.requests]


@dataclass(eq=False)
class Charge:
    """A tenant: its method, whether its twin does what it does (not where it draws at random), and its state."""

    name: str
    method: str
    twin: Engine | None
    adopted: bool = False
    """Whether the tiers know it."""


class World:
    """See the module. ``folder`` is for states and adapters; ``share`` is the part of the answers that is checked."""

    def __init__(self, folder: Path, seed: int, share: float = 0.5) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.share = share
        base = tiny()
        self.engine = Engine(
            base, micro_tokens=MICRO, sample_tokens=TOKENS, budgets=SMALL, folder=folder / "tiers"
        )
        self.model = base.model
        loop = self.engine.answering.loop
        assert loop is not None  # its answers come from pages
        self.loop: Loop = loop
        self.desk = Desk(self.engine, Policy(train_share=0.3, tokens_between=48))
        self.oracle = Oracle(base)
        self.untouched = Oracle(base).model
        """Nobody ever acts on this one."""
        self.bare = [name for name, _ in self.model.named_modules()]
        self.twins: dict[str, Engine] = {}
        self.charges: dict[str, Charge] = {}
        self.yard = tiers_of(self.model, self.engine.tenants, LARGE, folder / "yard")
        """Where tenants go down and come up again."""
        self.tiers = self.engine.tiers
        """Of those that only answer."""
        self.shelf: dict[str, Kept] = {}
        """Whom the tiers know, as they were when they were registered."""
        self.folders: dict[str, Path] = {}
        """Where they lie, of those that were registered from a folder."""
        self.torn: set[str] = set()
        self.waiting: list[Asked] = []
        self.works: list[Work] = []
        self.settled: deque[tuple[Waiting, Charge | None]] = deque()
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.history: deque[str] = deque(maxlen=40)
        gc.collect()
        gc.freeze()  # what is here now is not looked at again when objects are counted

    def close(self) -> None:
        """Read no more files."""
        self.yard.close()
        self.tiers.close()
        gc.unfreeze()

    @property
    def bank(self) -> Any:
        """Of the model, where somebody is attached."""
        return find_bank(self.model)

    def note(self, what: str) -> None:
        """One more of what was done."""
        self.done[what] += 1
        self.history.append(what)

    def attached(self) -> list[str]:
        """Names of those that are attached now."""
        return [] if self.bank is None else list(self.bank.adapters)

    # -- who waits -----------------------------------------------------------------------------------

    def follow(self, waiting: Asked | Work, future: Future[Any]) -> None:
        """Take in a future's end, with the tenant that has the name then."""
        waiting.future = future
        if isinstance(waiting, Asked):
            self.waiting.append(waiting)
        else:
            self.works.append(waiting)
        future.add_done_callback(
            lambda _: self.settled.append((waiting, self.charges.get(waiting.name or "")))
        )

    def excuse(self, name: str | None, *errors: type[BaseException]) -> None:
        """These errors may come of what was asked of an adapter (None: of anybody) so far."""
        for waiting in (*self.waiting, *self.works):
            if name is None or waiting.name == name:
                waiting.excuses.update(errors)

    def turn(self) -> bool:
        """One turn of the desk, and of those who ask the engine itself; whether there is more to do."""
        self.desk.turn()
        if self.loop.busy:
            self.loop.turn()
        return self.desk.busy or self.loop.busy
