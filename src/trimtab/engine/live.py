"""One answer that is made in one thread and read in another, or in a coroutine, as it is made.

    for piece in desk.stream(prompt):             async for piece in desk.stream(prompt):
        print(piece)                                  await send(piece)

The maker gives tokens to a `Feed` and waits for nobody; the reader makes text of them (`trimtab.engine.streaming`) and
gets what went wrong after all that came before. A reader who leaves, by `close`, by the end of a ``with``, or by losing
the answer, ends it: no further token is made.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Self, final

from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.engine.serve.request import Words
from trimtab.engine.streaming import Telling, check


@final
class Feed:
    """Tokens on their way. `give` and `end` are for who makes them, the rest for who reads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = 0
        self._tokens: list[int] = []
        self._end: Future[Any] | None = None
        self._call: Callable[[], object] | None = None
        self.cancelled = False

    def give(self, tokens: Sequence[int]) -> bool:
        """All tokens so far, those that were given before among them; whether more are wanted."""
        with self._changed:
            self._tokens += tokens[self._given :]
            news, self._given = len(tokens) > self._given, len(tokens)
            if news:
                self._wake()
        return not self.cancelled

    def end(self, future: Future[Any]) -> None:
        """No more will come; the future says how it ended."""
        with self._changed:
            self._end = future
            self._wake()

    def taken(self) -> tuple[list[int], Future[Any] | None]:
        """The tokens that are new, and how it ended, if it did."""
        with self._changed:
            tokens, self._tokens = self._tokens, []
            return tokens, self._end

    def wait(self) -> None:
        """Until there is something to take."""
        with self._changed:
            self._changed.wait_for(lambda: self._tokens or self._end is not None)

    def call(self, back: Callable[[], object]) -> None:
        """Call back, in any thread, as soon as there is something to take; once."""
        with self._changed:
            self._call = back
            if self._tokens or self._end is not None:
                self._wake()

    def cancel(self) -> None:
        """Want no more."""
        self.cancelled = True

    def _wake(self) -> None:
        self._changed.notify_all()
        back, self._call = self._call, None
        if back is not None:
            try:
                back()
            except RuntimeError:  # the loop of the coroutine that waited is closed
                self.cancelled = True


@final
class Live(Iterator[str], AsyncIterator[str]):
    """The pieces of one answer, in order; none is empty. Joined, they are the text that `Engine.sample` gives. For one
    reader, who may be a thread or a coroutine.

    Raises:
        ConfigError: ``params.n`` is not 1; or as `Guides.learn`. What goes wrong later is raised where pieces are read.
    """

    def __init__(self, words: Words, params: SamplingParams) -> None:
        check(words, params)
        self.feed = Feed()
        self._telling = Telling(words, params)
        self._over = False
        self._error: BaseException | None = None
        self._completion: Completion | None = None
        weakref.finalize(self, self.feed.cancel).atexit = False

    def __next__(self) -> str:
        while (piece := self._piece()) is None:
            self.feed.wait()
        if not piece:
            raise StopIteration
        return piece

    async def __anext__(self) -> str:
        loop = asyncio.get_running_loop()
        while (piece := self._piece()) is None:
            come = asyncio.Event()
            self.feed.call(lambda come=come: loop.call_soon_threadsafe(come.set))  # type: ignore[misc]
            await come.wait()
        if not piece:
            raise StopAsyncIteration
        return piece

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: soon no further token is made. What was read stays in `completion`."""
        self._over = True
        self.feed.cancel()

    @property
    def completion(self) -> Completion:
        """The answer as far as it was read; at its end, what `Engine.sample` gives."""
        return self._telling.completion if self._completion is None else self._completion

    def _piece(self) -> str | None:
        """What can be said now; nothing at the end, None where more has to come."""
        if self._over:
            error, self._error = self._error, None
            if error is not None:
                raise error
            return ""
        tokens, end = self.feed.taken()
        piece = "".join(self._said(tokens))
        if end is not None:
            self._over = True
            if end.cancelled() or (error := end.exception()) is None:
                piece += self._telling.rest()
            else:
                self._error = error
            if not end.cancelled() and self._error is None:
                (self._completion,) = end.result()
            return piece or self._piece()
        return piece or None

    def _said(self, tokens: Iterable[int]) -> Iterator[str]:
        for token in tokens:
            if not self._telling.over:
                yield self._telling.add(token)
