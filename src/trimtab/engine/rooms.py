"""Who is told where a training step is: the seam between the engine and a profile of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar, final

from torch import Tensor

Room = Literal["data", "base", "adapter", "attention", "head", "optimiser", "other"]
"""Where the time of a step goes: reading, packing and collating; the frozen layers; the methods' own tensors; the
attention function; the output head and the loss; the optimiser's step; and what is left."""
T = TypeVar("T")


class Rooms(ABC):
    """Told of the parts of a training step as the engine enters them."""

    @abstractmethod
    def inside(self, room: Room) -> AbstractContextManager[None]:
        """What happens inside belongs to a room."""

    @abstractmethod
    def backward(self, objective: Tensor) -> AbstractContextManager[None]:
        """Inside, gradients of ``objective`` are computed."""

    def each(self, room: Room, items: Iterable[T]) -> Iterator[T]:
        """The items, each of them made in a room."""
        left = iter(items)
        while True:
            with self.inside(room):
                found = next(left, None)
            if found is None:
                return
            yield found


@final
class Unwatched(Rooms):
    """Nobody is told."""

    def inside(self, room: Room) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, objective: Tensor) -> AbstractContextManager[None]:
        return nullcontext()
