"""Where adapters act, how somebody keeps one there, and what there is to wait for.

A place to act is whatever `Active` is: a model that they are attached to (`trimtab.adapt.attached`), or another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum, unique
from types import TracebackType

from trimtab.adapt.packed import Packed


@unique
class Waiting(Enum):
    """Why an adapter cannot be had at once; ask again later."""

    READING = "it is being read from disk"
    FULL = "there is no room: all that could make way is held"
    NAMED = "another adapter that had its name is held"


class Active(ABC):
    """Where adapters act. Abstract."""

    @abstractmethod
    def up(self, name: str, packed: Packed) -> None:
        """Let an adapter act. Raises what attaching raises; nothing is changed then."""

    @abstractmethod
    def down(self, name: str) -> Packed | None:
        """Let it act no more; what it is by now, or None where it is as it was brought up."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Keep nothing of an adapter that is down and will not come up."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether an adapter of that name acts here, whoever brought it."""

    @abstractmethod
    def plain(self, name: str) -> bool:
        """Whether an adapter that is down will act as its values say, with nothing said of it besides."""

    @abstractmethod
    def cost(self, packed: Packed) -> int:
        """Bytes that an adapter will take where it acts."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes that an adapter takes where it acts, and packed, as it is now."""


class Hold:
    """An adapter that stays up until it is released, or the ``with`` ends."""

    __slots__ = ("_release", "name")

    def __init__(self, name: str, release: Callable[[], None]) -> None:
        self.name = name
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Need it no more. A second time does nothing."""
        if self._release is not None:
            release, self._release = self._release, None
            release()

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
