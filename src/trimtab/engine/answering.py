"""Answers of one model: from pages, many requests at a time; where those do not fit, in batches of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.adapt.active import Hold, Waiting
from trimtab.adapt.bank import Plan
from trimtab.adapt.claim import Claim
from trimtab.adapt.route import Route
from trimtab.adapt.tiers import Tiers
from trimtab.engine import sampling
from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.engine.serve.adapters import Adapters
from trimtab.engine.serve.fits import model_fits
from trimtab.engine.serve.line import no_room
from trimtab.engine.serve.loop import Loop
from trimtab.engine.serve.request import Request, Words
from trimtab.engine.streaming import Stream, tokens_alone
from trimtab.errors import DataError, UnsupportedError

Scope = Callable[[Route, Plan | None], AbstractContextManager[None]]


class Answering:
    """``scope`` makes a context in which the model answers; ``tokens`` are the most positions, of prompts and answers,
    that are kept at once, and ``slots`` the most bytes of adapters' copies; ``tiers`` is the registry of adapters that
    are not attached."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        scope: Scope,
        tokens: int,
        slots: int,
        tiers: Tiers,
    ) -> None:
        self.model = model
        self.scope = scope
        self.tokens = tokens
        self.slots = slots
        self.adapters = Adapters(model, tiers)
        """What may be named."""
        self._tokenizer = tokenizer
        self._loops: list[Loop] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises `DataError` where there is none."""
        if self._tokenizer is None:
            raise DataError("to sample, the engine needs a tokenizer: Engine(model, tokenizer).")
        return self._tokenizer

    @cached_property
    def words(self) -> Words:
        """What ends an answer, and how tokens become text."""
        ends = frozenset(sampling.end_ids(self.model, self.tokenizer))
        return Words(self.tokenizer, ends, self.model.config.get_text_config().vocab_size)

    @cached_property
    def loop(self) -> Loop | None:
        """The requests in progress; None where this model's keys and values cannot lie in pages."""
        with self.scope(Route.everyone(()), None):
            fits = model_fits(self.model)
        if fits:
            tiers = self.adapters.tiers
            made = Loop(self.model, self.scope, tiers, tokens=self.tokens, slots=self.slots)
            self._loops = [made]
        return self._loops[0] if fits else None

    def drain(self, owner: str) -> None:
        """Finish the answers of an adapter that is about to change."""
        for loop in self._loops:
            loop.drain(owner)

    def paged(self, owner: str | None) -> bool:
        """Whether answers of that adapter come from pages."""
        return self.loop is not None and self.adapters.in_pages(owner)

    def requests(
        self, prompt: Sequence[int], params: SamplingParams, owner: str | None, number: int = 0,
        salt: str | None = None,
    ) -> list[Request]:  # fmt: skip
        """``params.n`` of them; those after the first wait for its prompt to be read. Only where there is a loop."""
        assert self.loop is not None
        made: list[Request] = []
        for turn in range(params.n):
            leader = made[0] if made else None
            actor = self.adapters.actor(owner, self.loop.seats)
            made.append(
                Request(tuple(prompt), params, actor, self.words, number, turn, leader, salt)
            )
        return made

    def submitted(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, owner: str | None,
        salt: str | None = None,
    ) -> list[Request]:  # fmt: skip
        """Requests that the loop has been told of; none where it cannot answer them."""
        loop = self.loop
        if loop is None or not self.paged(owner):
            return []
        made = [r for n, p in enumerate(prompts) for r in self.requests(p, params, owner, n, salt)]
        for request in made:
            loop.check(request)
        for request in made:
            loop.submit(request)
        return made

    def sample(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[str | None], params: SamplingParams,
        salt: str | None = None,
    ) -> list[Completion]:  # fmt: skip
        """``params.n`` completions of each prompt, in the order of the prompts."""
        found: dict[int, list[Completion]] = {}
        paged = {owner for owner in set(owners) if self.paged(owner)}
        if self.loop is not None:
            own = [n for n, owner in enumerate(owners) if owner in paged]
            asked = [r for n in own for r in self.requests(prompts[n], params, owners[n], n, salt)]
            for request in asked:
                self.loop.check(request)
            for request in asked:
                self.loop.submit(request)
            self.loop.finish(asked)
            for request in asked:
                found.setdefault(request.number, []).append(request.completion())
        rest = [n for n, owner in enumerate(owners) if owner not in paged]
        for numbers in self._apart(rest, owners):
            with self._held(owners[numbers[0]]):
                for number, completion in self._in_batches(prompts, owners, params, numbers):
                    found.setdefault(number, []).append(completion)
        return [completion for number in range(len(prompts)) for completion in found[number]]

    def _apart(self, numbers: Sequence[int], owners: Sequence[str | None]) -> list[list[int]]:
        """Those whose adapters are there, together; and those of each registered adapter by themselves."""
        found: dict[str | None, list[int]] = {}
        for number in numbers:
            owner = owners[number]
            registered = owner is not None and owner in self.adapters.tiers
            found.setdefault(owner if registered else None, []).append(number)
        return list(found.values())

    @contextmanager
    def _held(self, owner: str | None) -> Iterator[None]:
        """Have a registered adapter attached inside the ``with``; others are answered while it comes."""
        if owner is None or owner not in self.adapters.tiers:
            yield
            return
        claim = self.adapters.tiers.claim(owner)
        try:
            with self._come(claim):
                yield
        finally:
            claim.release()

    def _come(self, claim: Claim) -> Hold:
        tiers, loop = self.adapters.tiers, self.loop
        while isinstance(found := claim.hold(), Waiting):
            if loop is not None and loop.busy:
                loop.turn()
            elif tiers.reading:
                tiers.wait()
            else:
                raise no_room(claim.name)
        return found

    def _in_batches(
        self, prompts: Sequence[Sequence[int]], owners: Sequence[str | None], params: SamplingParams,
        numbers: Sequence[int],
    ) -> Iterator[tuple[int, Completion]]:  # fmt: skip
        if numbers and params.logprobs is not None:
            raise UnsupportedError(
                f"log-probabilities come with answers from pages, and keys and values of {type(self.model).__name__} "
                "(or of this adapter) cannot lie in pages."
            )
        repeated = [number for number in numbers for _ in range(params.n)]
        plan = (
            sampling.batches([prompts[i] for i in repeated], params.max_tokens, self.tokens)
            if repeated
            else []
        )
        found: dict[int, Completion] = {}
        for number, members in enumerate(plan):
            chosen = [repeated[member] for member in members]
            seed = None if params.seed is None else params.seed + number
            names = tuple(_owner(owners[index]) for index in chosen)
            route = Route.everyone(names[0]) if len(set(names)) == 1 else Route(names)
            with self.scope(route, None):
                rows = sampling.generate(
                    self.model, self.tokenizer, [prompts[i] for i in chosen], params, seed,
                    self.words.guides.each(params.grammar, len(chosen)),
                )  # fmt: skip
            for member, index, row in zip(members, chosen, rows, strict=True):
                found[member] = Completion(index, *row)
        yield from ((repeated[member], found[member]) for member in range(len(repeated)))

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, owner: str | None, salt: str | None = None
    ) -> Stream:  # fmt: skip
        """One completion in pieces of text."""
        return Stream(self.words, params, lambda: self.each_token(prompt, params, owner, salt))

    def each_token(
        self, prompt: Sequence[int], params: SamplingParams, owner: str | None, salt: str | None = None
    ) -> Iterator[int]:  # fmt: skip
        """Those of one completion, as they are made."""
        if self.loop is not None and self.paged(owner):
            (request,) = self.requests(prompt, params, owner, salt=salt)
            yield from self._of_request(self.loop, request)
        else:
            route = Route.everyone(_owner(owner))
            with self._held(owner):
                yield from tokens_alone(
                    self.model, self.tokenizer, prompt, params, lambda: self.scope(route, None),
                    self.words.guides.each(params.grammar, 1),
                )  # fmt: skip

    def _of_request(self, loop: Loop, request: Request) -> Iterator[int]:
        """Its tokens, as turns make them; left in the middle, it is taken back."""
        loop.submit(request)
        given = 0
        try:
            while given < len(request.tokens) or not request.done:
                if given == len(request.tokens):
                    loop.turn()
                    continue
                given += 1  # others may make turns before the next one is asked for
                yield request.tokens[given - 1]
            if request.error is not None:
                raise request.error
        finally:
            request.cancel()
            loop.turn_away()


def _owner(who: str | None) -> tuple[str, ...]:
    return () if who is None else (who,)
