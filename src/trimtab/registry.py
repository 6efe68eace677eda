"""One small registry: names to objects, built-in and from other packages alike.

An entry is an object or a lazy ``"module:attribute"`` reference. Built-in entries are written in the
table of their registry; other packages add theirs by an entry point in the group of the registry
(``trimtab.methods``, ``trimtab.frozen``, …) or by calling `Registry.add`. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from trimtab.errors import ConfigError, UnknownNameError, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing. ``group`` is the entry-point group that extends it."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._references: dict[str, str] = dict(builtin)
        self._objects: dict[str, T] = {}
        self._scanned = False

    def add(self, name: str, entry: T) -> T:
        """Register an object under a new name."""
        self._scan()
        if name in self._references or name in self._objects:
            raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name.")
        self._objects[name] = entry
        return entry

    def remove(self, name: str) -> None:
        """Forget a name that was added at run time."""
        self._objects.pop(name)

    def get(self, name: str) -> T:
        """The object of that name, imported now if it was a reference."""
        self._scan()
        if name not in self._objects:
            if name not in self._references:
                known = self.names()
                hint = suggest(name, known) or f" Known: {', '.join(known)}."
                raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint}")
            module, _, attribute = self._references[name].partition(":")
            self._objects[name] = getattr(import_module(module), attribute)
        return self._objects[name]

    def names(self) -> list[str]:
        """All names, sorted; nothing is imported."""
        self._scan()
        return sorted({*self._references, *self._objects})

    def items(self) -> Iterator[tuple[str, T]]:
        """All entries, imported, in the order of their names."""
        for name in self.names():
            yield name, self.get(name)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=self.group):
            if point.name in self._references:
                raise ConfigError(
                    f"package {point.dist.name if point.dist else '?'} registers {self.kind} "
                    f"{point.name!r}, which exists already; it must choose another name."
                )
            self._references[point.name] = point.value
