"""The desk: many tenants' requests for one engine, in order for each adapter and joined across adapters.

What is asked of one adapter is done in the order in which it was asked; a step of its optimiser waits for its gradients
and nobody else's. Whatever stands first for several adapters is done together: data are taken from each in turn, in
equal shares of tokens (deficit round robin), up to what one forward and backward may hold, and all answers are made in
one loop. An answer begins when it stands first, with the values that its adapter has then, and what was asked of the
adapter after it need not wait for its end.

A turn serves first: everyone who is being answered gets a token. It trains as well where nobody is answered, or where
training has had less than its share of the time; then a small micro-batch, so that the next token comes soon.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Self, final

from trimtab.adapt.bank import bank_of
from trimtab.config import Config
from trimtab.data import Datum
from trimtab.engine.aims import Aim, loss_from
from trimtab.engine.engine import Engine
from trimtab.engine.jobs import Answers, Call, Gradients, Job, Told
from trimtab.engine.live import Live
from trimtab.engine.results import LossResult, StepResult, joined, picked
from trimtab.engine.sampling import Completion, SamplingParams
from trimtab.errors import AnswerError, UnknownNameError
from trimtab.optim.params import AdamParams


class Policy(Config):
    """Who comes first. ``train_share`` is the least part of the time that training gets while answers are made;
    ``tokens_between`` the most tokens of a micro-batch then."""

    train_share: float = 0.1
    tokens_between: int = 256


@final
class Desk:
    """See the module. The verbs return futures; `turn` does the work, in one thread at a time: the caller's, or the
    desk's own between `start` and `close`. Nobody else uses the engine meanwhile."""

    def __init__(self, engine: Engine, policy: Policy | None = None) -> None:
        self.engine = engine
        self.policy = policy or Policy()
        self._queues: dict[str | None, deque[Job]] = {}
        self._owed: dict[str | None, int] = {}
        """Tokens that an adapter may still take before the others have had theirs."""
        self._answering: list[Answers] = []
        self._trained = self._served = 0.0
        self._asked = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- what may be asked -------------------------------------------------------------------------------

    def forward_backward(
        self, data: Sequence[Datum], adapter: str, loss: Aim = "cross_entropy"
    ) -> Future[LossResult]:
        """As the engine's, of one adapter. Raises what is wrong with the data at once."""
        self.engine.check(data, adapter, loss)
        size = loss_from(loss).together
        units = (list(data[start : start + size]) for start in range(0, len(data), size))
        return self._ask(Gradients(adapter, units=deque((unit, loss) for unit in units)))

    def optim_step(self, adapter: str, params: AdamParams) -> Future[StepResult]:
        """As the engine's."""
        return self._ask(Call(adapter, work=lambda: self.engine.optim_step(adapter, params)))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        salt: str | None = None,
    ) -> Future[list[Completion]]:
        """As the engine's, of one adapter or the bare base. A grammar is compiled here, while others are answered."""
        params = params or SamplingParams()
        if params.grammar is not None:
            self.engine.answering.words.guides.learn(params.grammar)
        return self._ask(Answers(adapter, prompts=prompts, params=params, salt=salt))

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        adapter: str | None = None,
        *,
        salt: str | None = None,
    ) -> Live:
        """One answer, to be read as it is made, in another thread or in a coroutine; leaving it ends it."""
        params = params or SamplingParams()
        live = Live(self.engine.answering.words, params)
        self._ask(Told(adapter, prompts=[prompt], params=params, salt=salt, feed=live.feed))
        return live

    def save(
        self, adapter: str, folder: str | Path, extra: Mapping[str, Any] | None = None
    ) -> Future[Path]:
        """As the engine's."""
        return self._ask(Call(adapter, work=lambda: self.engine.save(adapter, folder, extra)))

    def load(self, folder: str | Path, adapter: str) -> Future[dict[str, Any]]:
        """As the engine's."""
        return self._ask(Call(adapter, work=lambda: self.engine.load(folder, adapter)))

    def call(self, adapter: str | None, work: Callable[[], Any]) -> Future[Any]:
        """Anything else that is to be done in an adapter's order (attaching, detaching), in the desk's thread."""
        return self._ask(Call(adapter, work=work))

    def _ask(self, job: Job) -> Future[Any]:
        with self._asked:
            if self._closing:
                raise AnswerError("the desk is closed; nothing more is done.")
            self._queues.setdefault(job.adapter, deque()).append(job)
            self._asked.notify()
        return job.future

    # -- turns -------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        with self._asked:
            return bool(self._queues or self._answering)

    def turn(self) -> bool:
        """Do some of what was asked; false where there is nothing to do."""
        self._begin()
        loop = self.engine.answering.loop if self._answering else None
        if self._answering and loop is not None:
            began = time.perf_counter()
            loop.turn()
            self._served += time.perf_counter() - began
            self._end()
        share = self.policy.train_share
        if not self._answering or self._trained < share * (self._trained + self._served):
            began = time.perf_counter()
            self._train(between=bool(self._answering))
            self._trained += time.perf_counter() - began
        if not self._answering:
            self._trained = self._served = 0.0
        return self.busy

    def run(self) -> None:
        """Turns until nothing is left to do."""
        while self.turn():
            pass

    def _heads(self) -> list[Job]:
        """What stands first for each adapter."""
        with self._asked:
            return [queue[0] for queue in self._queues.values()]

    def _done(self, job: Job) -> None:
        """What stood first for an adapter does so no more."""
        with self._asked:
            queue = self._queues[job.adapter]
            queue.popleft()
            if not queue:
                del self._queues[job.adapter]
                self._owed.pop(job.adapter, None)

    def _begin(self) -> None:
        """Do what takes no turns, and let answers begin."""
        waiting = deque(self._heads())
        while waiting:
            job = waiting.popleft()
            if isinstance(job, Gradients) and not job.future.cancelled() and job.units:
                continue
            self._done(job)
            if isinstance(job, Call):
                job.settle(job.work)
            elif isinstance(job, Answers):
                self._open(job)
            elif isinstance(job, Gradients):
                job.settle(partial(joined, job.found))
            with self._asked:
                following = self._queues.get(job.adapter)
                if following:
                    waiting.append(following[0])

    def _open(self, job: Answers) -> None:
        if not job.begun():
            return
        try:
            job.begin(self.engine)
            if job.requests:
                self._answering.append(job)
            else:  # not from pages
                job.future.set_result(job.at_once(self.engine))
        except Exception as error:
            job.future.set_exception(error)

    def _end(self) -> None:
        """Give back the answers that are done."""
        for job in list(self._answering):
            job.tell()
            if not all(request.done for request in job.requests):
                continue
            self._answering.remove(job)
            try:
                job.future.set_result([request.completion() for request in job.requests])
            except Exception as error:
                job.future.set_exception(error)

    # -- training ----------------------------------------------------------------------------------------

    def _train(self, *, between: bool) -> None:
        """One forward and backward over what stands first for each adapter."""
        heads = [job for job in self._heads() if isinstance(job, Gradients) and job.units]
        heads = [job for job in heads if self._stands(job)]
        if not heads:
            return
        budget = self.engine.micro_tokens
        if between:
            budget = min(budget, self.policy.tokens_between)
        taken = self._taken(heads, budget)
        rows = [(job, datum, loss) for job, unit, loss in taken for datum in unit]
        data, owners = [row[1] for row in rows], [str(row[0].adapter) for row in rows]
        try:
            result = self.engine.forward_backward(data, owners, [row[2] for row in rows])
            errors: Mapping[str | None, Exception] = result.errors
        except Exception as error:
            result, errors = LossResult((), (), ()), dict.fromkeys(owners, error)
        for job in dict.fromkeys(row[0] for row in rows):
            failed = errors.get(job.adapter)
            if failed is not None:
                self._done(job)
                job.fail(failed)
                continue
            own = [number for number, row in enumerate(rows) if row[0] is job]
            job.found.append(picked(result, own, str(job.adapter)))
        self._begin()

    def _stands(self, job: Gradients) -> bool:
        """Whether what was asked can still be done: nobody may want it, and its adapter may be another one or none by
        now. It begins with that, and is done as a whole or not at all."""
        if not job.begun():
            self._done(job)
            return False
        try:
            self._check(job)
        except Exception as error:
            if job.learner and (tenant := self.engine.tenants.known(job.learner)):
                tenant.discard()
            self._done(job)
            job.fail(error)
            return False
        return True

    def _check(self, job: Gradients) -> None:
        name = str(job.adapter)
        data = [datum for unit, _ in job.units for datum in unit]
        self.engine.check(data, name, job.units[0][1])
        adapter = bank_of(self.engine.model).require(name)
        if job.learner is not None and job.learner is not adapter:
            raise UnknownNameError(f"adapter {name!r} was taken out or replaced while it learnt.")
        job.learner = adapter

    def _taken(
        self, heads: Sequence[Gradients], budget: int
    ) -> list[tuple[Gradients, list[Datum], Aim]]:
        """Units in equal shares of tokens, until the next one does not fit; one at least."""
        quantum = max(budget // len(heads), 1)
        taken: list[tuple[Gradients, list[Datum], Aim]] = []
        room = budget
        waiting = deque(sorted(heads, key=lambda job: -self._owed.get(job.adapter, 0)))
        while waiting and room > 0:
            job = waiting.popleft()
            most = max(quantum, _size(job.units[0][0]))  # nobody saves up for more than a unit
            owed = self._owed[job.adapter] = min(self._owed.get(job.adapter, 0) + quantum, most)
            while job.units and (size := _size(job.units[0][0])) <= max(owed, 0):
                if size > room and taken:
                    return taken
                taken.append((job, *job.units.popleft()))
                room -= size
                owed = self._owed[job.adapter] = owed - size
            if job.units:
                waiting.append(job)
            else:
                self._owed[job.adapter] = 0
        return taken

    # -- a thread of its own -----------------------------------------------------------------------------

    def start(self) -> Self:
        """Make turns in a thread of the desk's own, from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trimtab-desk", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Finish what was asked, and take nothing more."""
        with self._asked:
            self._closing = True
            self._asked.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self.run()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._asked:
                while not (self._queues or self._answering or self._closing):
                    self._asked.wait()
                if self._closing and not (self._queues or self._answering):
                    return
            try:
                self.turn()
            except BaseException as error:
                self._give_up(error)
                raise

    def _give_up(self, error: BaseException) -> None:
        """Nothing more will be done; nobody is to wait for it."""
        with self._asked:
            self._closing = True
            left = [*self._answering, *(job for queue in self._queues.values() for job in queue)]
            self._queues.clear()
        for job in left:
            for request in job.requests if isinstance(job, Answers) else ():
                request.cancel()
            job.fail(
                AnswerError(f"the desk's thread has stopped, by {type(error).__name__}: {error}")
            )
        self._answering = []


def _size(unit: Sequence[Datum]) -> int:
    return sum(map(len, unit))
