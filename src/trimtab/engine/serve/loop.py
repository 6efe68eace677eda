"""The turns of serving: who is let in, whose prompt is read, who gets a token.

A turn lets waiting requests in, as far as there are pages; reads prompts, up to a number of tokens, so that nobody who
is being answered waits long; and gives each request whose prompt has been read one token, all in one forward, whatever
their adapters. Where pages run out, the request that came last gives its own back and waits; its text is read again
later, and what it draws stays the same.

A forward that fails is tried again adapter by adapter, so that only those requests fail that it fails for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.adapt.bank import Plan, find_bank
from trimtab.adapt.documents import PAGES, apart
from trimtab.adapt.lean import Lean
from trimtab.adapt.pages import SIZE, Pages, Store, Unit
from trimtab.adapt.route import Route
from trimtab.adapt.stack import BUDGET, Stack
from trimtab.adapt.tiers import Tiers
from trimtab.adapt.tree import anatomy_of
from trimtab.engine.serve import draw
from trimtab.engine.serve.ledger import Ledger
from trimtab.engine.serve.line import Line
from trimtab.engine.serve.pieces import Piece, place_of, route_of, spans_of
from trimtab.engine.serve.remembered import joined, split
from trimtab.engine.serve.request import Request
from trimtab.engine.serve.seats import Seats
from trimtab.errors import AnswerError

Scope = Callable[[Route, Plan], AbstractContextManager[None]]
"""Makes a context in which the model runs: eval mode, and who acts."""


class Loop:
    """Requests of one model, and the pages that they share.

    Args:
        tiers: the registry of adapters that are not attached.
        tokens: positions of all pages together.
        slots: the most bytes of the copies of adapters that lie in slots.
        rows: the most requests that are answered at once.
        prefill: the most tokens of prompts that are read in a turn.
    """

    def __init__(
        self, model: PreTrainedModel, scope: Scope, tiers: Tiers, *, tokens: int, slots: int = BUDGET,
        rows: int = 256, prefill: int = 512,
    ) -> None:  # fmt: skip
        self.model = model
        self.scope = scope
        self.rows = rows
        self.prefill = prefill
        pages = -(-tokens // SIZE)
        self.store = Store(pages)
        self.ledger = Ledger(pages, SIZE)
        self.seats = Seats(None if anatomy_of(model).apart else Stack.of(model, slots))
        self.waiting = Line(self.seats, tiers)
        self.running: list[Request] = []

    # -- who is served -----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Put a request behind those that wait, with the values that its adapter has now, where it is attached. Raises
        as `check`."""
        self.check(request)
        request.actor.ask()
        self.waiting.join(request)

    def check(self, request: Request) -> None:
        """Raise `AnswerError` where all pages together are too few for a request."""
        most = -(-request.most // SIZE)
        if most > self.ledger.pages:
            raise AnswerError(
                f"a prompt of {len(request.prompt)} tokens with max_tokens={request.params.max_tokens} needs "
                f"{most * SIZE} places for keys and values, and there are {self.ledger.pages * SIZE}; raise the "
                "engine's sample_tokens."
            )

    def turn(self) -> None:
        """One forward for those who are answered, and one for prompts."""
        self.turn_away()
        self._let_in()
        with Lean(self.model), torch.no_grad():
            ready = [request for request in self.running if request.answering]
            self._each(self._with_pages(ready), self._decode)
            for pieces in self._to_read(ready):
                self._each(pieces, self._read)
        self.turn_away()

    def finish(self, requests: Sequence[Request]) -> None:
        """Turns until these are done. Left in the middle, it takes them back."""
        try:
            while not all(request.done for request in requests):
                self.turn()
        except BaseException:
            for request in requests:
                request.cancel()
            self.turn_away()
            raise

    def drain(self, name: str) -> None:
        """Finish the requests on which an adapter acts by its name, with the values that it has now."""
        self.finish([r for r in [*self.running, *self.waiting] if name in r.owner])

    def turn_away(self) -> None:
        """Let go of those who are done, are wanted no more, or whose attached adapter is another one, none, or goes
        otherwise far by now."""
        bank = find_bank(self.model)
        for request in [*self.running, *self.waiting]:
            if request.cancelled and not request.done:
                request.finish = "cancelled"
            if not request.done:
                request.error = request.actor.lost(bank)
        for request in [r for r in self.running if r.done]:
            self._known(request)
            self._vacate(request)
        for request in [*self.running, *self.waiting]:
            if request.done:
                request.actor.leave()
        self.running = [r for r in self.running if not r.done]
        self.waiting.leave()
        if not self.busy:
            self.seats.clear()

    def _let_in(self) -> None:
        self.waiting.let_in(self._placed)
        if not self.running:
            self.waiting.nobody_runs()

    def _placed(self, request: Request) -> bool:
        """Give a request its pages, those that hold a beginning of its text among them."""
        if len(self.running) >= self.rows:
            return False
        text = self._content(request)
        known = [] if request.root is None else self.ledger.find(request.known_by, text)
        if len(known) * SIZE < request.lead:
            known = []
        wanted = request.most if request.remembers else len(text) + 1
        count = -(-wanted // SIZE) - len(known)
        self.ledger.share(known)
        if count > self.ledger.room:
            self.ledger.release(known)
            return False
        request.pages = [*known, *self.ledger.take(max(count, 0))]
        request.filled = len(known) * SIZE
        self.running.append(request)
        return True

    def _content(self, request: Request) -> list[int]:
        """What stands in its pages: virtual tokens, as numbers that no token has, and its text."""
        return [*range(-request.lead, 0), *request.text]

    def _known(self, request: Request) -> None:
        """Let others find what it has read."""
        if request.root is not None and request.pages and request.error is None:
            content = self._content(request)[: request.filled]
            self.ledger.keep(request.known_by, content, request.pages)

    def _vacate(self, request: Request) -> None:
        if request.error is not None:
            # what it wrote may be no numbers, which even a mask does not hide
            self.store.clear(self.ledger.own(request.pages))
        self.ledger.release(request.pages)
        request.pages, request.filled, request.memory = [], 0, {}

    def _with_pages(self, requests: list[Request]) -> list[Request]:
        """Those that have a place for one more token; the last ones give theirs up for it, if need be."""
        kept: list[Request] = []
        waiting = list(requests)
        while waiting:
            request = waiting.pop(0)
            if request.filled < len(request.pages) * SIZE:
                kept.append(request)
            elif self.ledger.room:
                request.pages += self.ledger.take(1)
                kept.append(request)
            else:
                other = next((r for r in reversed(waiting) if not r.remembers), request)
                self._known(other)
                self._vacate(other)
                self.running.remove(other)
                self.waiting.again(other)
                if other is not request:
                    waiting.remove(other)
                    waiting.insert(0, request)
        return kept

    # -- forwards ----------------------------------------------------------------------------------------

    def _to_read(self, answered: Sequence[Request]) -> Iterator[list[Piece]]:
        """What of the prompts is read in this turn: together, but those that decide something one by one."""
        room = self.prefill
        together: list[Piece] = []
        for request in self.running:
            if request in answered or room <= 0:
                continue
            unread = request.unread - (1 if request.tokens else 0)
            whole = request.remembers or (request.lead and not request.filled)
            count = unread if whole else min(unread, room)
            room -= count
            piece = Piece(request, count)
            if request.remembers:
                yield [piece]
            else:
                together.append(piece)
        if together:
            yield sorted(together, key=lambda piece: place_of(piece.request))

    def _each(self, items: list[Any], work: Callable[[list[Any]], None]) -> None:
        """Work on all together; where that fails, on those of each adapter by themselves."""
        if not items:
            return
        try:
            work(items)
            return
        except Exception as error:
            names = dict.fromkeys(_request(item).name for item in items)
            if len(names) == 1:
                for item in items:
                    _request(item).error = error
                return
        for name in names:
            self._each([item for item in items if _request(item).name == name], work)

    def _read(self, pieces: list[Piece]) -> None:
        """Read pieces of texts, one after another in one row; those that end get their first token."""
        alone = pieces[0].request if pieces[0].request.remembers else None
        spans = None if alone is not None else spans_of(pieces)
        route = route_of([piece.request for piece in pieces], spans, each=alone is not None)
        memory: dict[Any, Any] = {}
        pages = Pages(self.store, [piece.unit for piece in pieces], decoding=False)
        last = [sum(p.count for p in pieces[: n + 1]) - 1 for n in range(len(pieces))]
        logits = self._forward(
            [[token for piece in pieces for token in piece.ids]],
            [[place for piece in pieces for place in piece.positions]],
            pages,
            route,
            Plan(memory=memory),
            torch.tensor(last),
        )
        done: list[tuple[int, Request]] = []
        for number, piece in enumerate(pieces):
            request = piece.request
            ends = piece.ends
            request.filled = piece.unit.stop
            if alone is not None:
                request.memory = {k: v for k, v in memory.items() if k[0] != "prompt"}
            if ends:
                done.append((number, request))
        if done:
            self._draw(logits[0, [number for number, _ in done]], [r for _, r in done])
            for _, request in done:
                self._known(request)

    def _decode(self, requests: list[Request]) -> None:
        """One token for each."""
        requests = sorted(requests, key=place_of)
        remembering = any(request.remembers for request in requests)
        route = route_of(requests, None, each=remembering)
        memory = joined([r.memory for r in requests]) if remembering else {}
        units = [Unit(tuple(r.pages), r.filled, 1) for r in requests]
        logits = self._forward(
            [[r.tokens[-1]] for r in requests],
            [[r.read] for r in requests],
            Pages(self.store, units, decoding=True),
            route,
            Plan(memory=memory, decoding=remembering),
            None,
        )
        for request in requests:
            request.filled += 1
        if remembering:
            for request, own in zip(requests, split(memory, len(requests)), strict=True):
                request.memory = own if request.remembers else {}
        self._draw(logits[:, 0], requests)

    def _forward(
        self, ids: list[list[int]], positions: list[list[int]], pages: Pages, route: Route, plan: Plan,
        last: Tensor | None,
    ) -> Tensor:  # fmt: skip
        device = self.model.device
        given: dict[str, Any] = {PAGES: pages}
        if last is not None:
            given["logits_to_keep"] = last.to(device)
        with self.scope(route, plan), apart(pages):
            out = self.model(
                input_ids=torch.tensor(ids, device=device),
                position_ids=torch.tensor(positions, device=device),
                use_cache=False,
                **given,
            )
        logits: Tensor = out.logits
        return logits

    def _draw(self, logits_BV: Tensor, requests: list[Request]) -> None:
        """The next token of each; a row of numbers that are none fails alone."""
        finite = logits_BV.amax(-1).isfinite().tolist()
        for request, well in zip(requests, finite, strict=True):
            if not well:
                who = f"adapter {request.name!r}" if request.name else "the base"
                request.error = AnswerError(
                    f"{who} gives logits that are not finite; its weights may have been damaged in training."
                )
        rows = [number for number, well in enumerate(finite) if well]
        if not rows:
            return
        chosen = [requests[number] for number in rows]
        logits = logits_BV if len(rows) == len(requests) else logits_BV[rows]
        try:
            tokens = draw.draw(
                logits, [draw.Row(r.params, r.generator, r.text, r.guide) for r in chosen]
            )
        except Exception as error:  # kept from who would try again: these texts have been read
            for request in chosen:
                request.error = error
            return
        self._note(logits, chosen, tokens)
        for request, token in zip(chosen, tokens, strict=True):
            request.take(token)

    def _note(self, logits: Tensor, requests: list[Request], tokens: list[int]) -> None:
        """Keep the log-probabilities of those who asked for them."""
        asked = [n for n, request in enumerate(requests) if request.params.logprobs is not None]
        if not asked:
            return
        logs = draw.log_probabilities(logits[asked])
        for row, number in enumerate(asked):
            request, count = requests[number], requests[number].params.logprobs or 0
            request.logprobs.append(float(logs[row, tokens[number]]))
            best = logs[row].topk(min(count, logs.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            request.likeliest.append(dict(pairs))


def _request(item: Request | Piece) -> Request:
    return item if isinstance(item, Request) else item.request
