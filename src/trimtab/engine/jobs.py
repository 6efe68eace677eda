"""What may be asked of a desk, and how far it has come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from trimtab.adapt.adapter import Adapter
from trimtab.data import Datum
from trimtab.engine.aims import Aim
from trimtab.engine.engine import Engine
from trimtab.engine.live import Feed
from trimtab.engine.results import LossResult
from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.engine.serve.request import Request
from trimtab.engine.streaming import Telling


@dataclass(eq=False)
class Job:
    """Something that was asked: ``adapter`` is in whose order it is done; None is nobody's."""

    adapter: str | None
    future: Future[Any] = field(default_factory=Future)

    def begun(self) -> bool:
        """Whether it is being done, from now on at the latest; what was cancelled before is not."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def settle(self, work: Callable[[], Any]) -> None:
        """Do it, if it is still wanted."""
        if not self.begun():
            return
        try:
            self.future.set_result(work())
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def fail(self, error: BaseException) -> None:
        """It will not be done, or not to its end."""
        if not self.future.done() and self.begun():
            self.future.set_exception(error)


@dataclass(eq=False)
class Gradients(Job):
    """Units of data (see `trimtab.engine.aims`) whose gradients are to be added, and what came of others."""

    units: deque[tuple[list[Datum], Aim]] = field(default_factory=deque)
    found: list[LossResult] = field(default_factory=list)
    learner: Adapter | None = None
    """Whose gradients they are, once it has begun."""


@dataclass(eq=False)
class Answers(Job):
    """Prompts to be answered."""

    prompts: Sequence[Sequence[int]] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    salt: str | None = None
    requests: list[Request] = field(default_factory=list)

    def begin(self, engine: Engine) -> None:
        """Make the requests; none where the answers are not made in turns. Raises as `Engine.requests`."""
        self.requests = engine.requests(self.prompts, self.params, self.adapter, salt=self.salt)

    def at_once(self, engine: Engine) -> list[Completion]:
        """The answers, not in turns."""
        return engine.sample(self.prompts, self.params, self.adapter)

    def tell(self) -> None:
        """Say how far the answers have come, to who wants to know."""


@dataclass(eq=False)
class Told(Answers):
    """One prompt, whose answer is told as it is made; who does not listen any more wants no more of it."""

    feed: Feed = field(default_factory=Feed)

    def __post_init__(self) -> None:
        self.future.add_done_callback(self.feed.end)

    def begin(self, engine: Engine) -> None:
        super().begin(engine)
        self.tell()

    def at_once(self, engine: Engine) -> list[Completion]:
        answering = engine.answering
        telling = Telling(answering.words, self.params)
        tokens: list[int] = []
        for token in answering.each_token(self.prompts[0], self.params, self.adapter):
            tokens.append(token)
            telling.add(token)
            if not self.feed.give(tokens) or telling.over:
                break
        return [telling.completion]

    def tell(self) -> None:
        for request in self.requests:
            if not self.feed.give(request.tokens):
                request.cancel()


@dataclass(eq=False)
class Call(Job):
    """Anything else that an engine does at once."""

    work: Callable[[], Any] = lambda: None
