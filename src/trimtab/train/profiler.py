"""Watches a few steps of a run, and makes a `Profile` of them.

Time is shared out by a clock (`trimtab.train.clock`): hooks say in which room the forward is
(`trimtab.train.instrument`), and before each node of the graph runs backward the clock goes to the room in which the
forward had made it, which the node's number tells. What a node keeps, its room keeps; a tensor that several keep counts
once, for the first that kept it. A look at the graph takes time of its own, during which the clock stands still.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.data import Datum
from trimtab.data.feed import Step
from trimtab.engine import Engine
from trimtab.engine.rooms import Room, Rooms
from trimtab.models.load import Base
from trimtab.train.clock import Clock, Place
from trimtab.train.graph import accumulates, kept, nodes, recomputed, storages
from trimtab.train.instrument import instrumented
from trimtab.train.profile import ROOMS, Profile, RoomUse, best_rate, holdings, multiplied

WARM_UP, PROFILED = 2, 5
"""Steps that are let pass, and steps that are profiled; fewer where there are fewer."""


def window(left: int) -> range:
    """Which of the steps that are left are profiled, by their place among them."""
    first = min(WARM_UP, max(left - 1, 0))
    return range(first, min(first + PROFILED, left))


@final
class Profiler(Rooms):
    """Of one run.

    Args:
        reading: the seconds that its data took before the first step.
        note: called with the profile, once, as soon as there is one.
    """

    def __init__(
        self,
        base: Base,
        engine: Engine,
        adapter: Adapter,
        *,
        reading: float,
        note: Callable[[Profile], None],
    ) -> None:
        self.base, self.engine, self.adapter = base, engine, adapter
        self._reading, self._note = reading, note
        self._clock = Clock(base.model.device)
        self._spent: dict[Place, float] = defaultdict(float)
        self._kept: Counter[Room] = Counter()
        self._kept_on_host = 0
        self._own = set(storages([*base.model.parameters(), *base.model.buffers()]))
        self._wanted = range(0)
        self._steps: list[int] = []
        self._tokens = self._trained = 0
        self._open: ExitStack | None = None
        self._found: Profile | None = None

    # -- steps ----------------------------------------------------------------------------------------

    def watched(self, steps: Iterator[Step], left: int) -> Iterator[Step]:
        """The steps as they are, of which some are profiled; each of those ends with `done`."""
        self._wanted = window(left)
        for place in range(left):
            if place in self._wanted:
                self._begin()
            with self.inside("data"):
                found = next(steps, None)
            if found is None:
                self.close()
                return
            yield found

    def done(self, step: int, members: Sequence[Datum]) -> None:
        """The step of that number is done, with these examples."""
        if self._open is not None:
            for place, seconds in self._clock.stop().items():
                self._spent[place] += seconds
            self._steps.append(step)
            self._tokens += sum(map(len, members))
            self._trained += sum(weight != 0 for datum in members for weight in datum.weights)
            self.close()
            if len(self._steps) == len(self._wanted):
                self.profile()

    def profile(self) -> Profile | None:
        """What was found; None if no step was profiled. Asked for the first time, it measures the machine."""
        self.close()
        if self._found is None and self._steps:
            self._found = self._made()
            self._note(self._found)
        return self._found

    def close(self) -> None:
        """Leave the model and the engine as they were."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def _begin(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(instrumented(self.engine.model, self._clock))
            stack.callback(self._rest, self.engine.rooms)
            self.engine.rooms = self
            self._open = stack.pop_all()
        self._clock.start()

    def _rest(self, rooms: Rooms) -> None:
        self.engine.rooms = rooms

    # -- inside a step --------------------------------------------------------------------------------

    def inside(self, room: Room) -> AbstractContextManager[None]:
        return self._clock.inside(room)

    @contextmanager
    def backward(self, objective: Tensor) -> Iterator[None]:
        clock = self._clock
        with clock.paused():
            self._look_at(objective)
        clock.backward = True
        try:
            with clock.inside("other"):
                yield
        finally:
            clock.backward = False

    def _look_at(self, objective: Tensor) -> None:
        """Have each node say its room when it runs, and note what it keeps."""
        turns: dict[Room, Callable[[object], None]] = {
            room: self._turn(room, self._clock.depth) for room in ROOMS
        }
        keeping: Counter[Room] = Counter()
        host, seen = 0, set(self._own)
        again: dict[int, Any] = {}
        device = self.base.model.device
        for node in sorted(nodes(objective), key=lambda node: int(node._sequence_nr())):
            room = "adapter" if accumulates(node) else self._clock.room_of(node._sequence_nr())
            node.register_prehook(turns[room])
            again |= {id(frame): frame for frame in recomputed(node)}
            for address, (place, size) in storages(kept(node)).items():
                if address not in seen:
                    seen.add(address)
                    keeping[room] += size * (place == device)
                    host += size * (place != device)
        for frame in again.values():  # the hooks in it say what of it is not the base's
            frame.recompute_fn = self._clock.timed("base", frame.recompute_fn)
        if sum(keeping.values()) + host >= self._kept.total() + self._kept_on_host:
            self._kept, self._kept_on_host = keeping, host

    def _turn(self, room: Room, depth: int) -> Callable[[object], None]:
        def turn(_: object) -> None:
            self._clock.go(room, depth)

        return turn

    # -- after ----------------------------------------------------------------------------------------

    def _made(self) -> Profile:
        count, model = len(self._steps), self.base.model
        rooms = {
            str(room): RoomUse(
                seconds=sum(self._spent.get((room, way), 0.0) for way in (False, True)) / count,
                backward=self._spent.get((room, True), 0.0) / count,
                kept=self._kept[room],
            )
            for room in ROOMS
        }
        dtype, (parameters, head) = model.dtype, multiplied(self.base)
        return Profile(
            first=self._steps[0],
            last=self._steps[-1],
            tokens=self._tokens / count,
            trained=self._trained / count,
            rooms=rooms,
            memory=holdings(self.engine, self.adapter, self._kept_on_host),
            parameters=parameters,
            head=head,
            rate=best_rate(dtype, model.device),
            dtype=str(dtype).removeprefix("torch."),
            device=_name(model.device),
            threads=torch.get_num_threads(),
            reading=self._reading,
        )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
