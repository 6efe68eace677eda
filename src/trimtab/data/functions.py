"""A user's own functions on rows: rename, leave out, filter, map.

A function is named as text, ``module:function`` or ``path/to/file.py:function``, or given as an
object. The source code it comes from is part of the digest, so that a cache notices an edit.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, final

from trimtab.data.messages import kind_of
from trimtab.data.source import Row, Source, sha256_of
from trimtab.errors import ConfigError, DataError, suggest


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function, the name it is known by, and the SHA-256 of the file that holds it."""

    name: str
    call: Callable[[dict[str, Any]], Any]
    digest: str


def load_function(what: str | Callable[[dict[str, Any]], Any]) -> UserFunction:
    """The function that ``what`` names. Raises `ConfigError` if there is none, or it cannot be loaded."""
    if not isinstance(what, str):
        if not callable(what):
            raise ConfigError(f"{what!r} is not a function, nor the name of one.")
        return UserFunction(str(what.__name__), what, _code_digest(what))
    place, _, name = what.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"{what!r} names no function; write module:function or path/to/file.py:function."
        )
    module = _load_file(place, what) if place.endswith(".py") else _load_module(place, what)
    found = vars(module).get(name)
    if found is None:
        hint = suggest(name, [key for key, value in vars(module).items() if callable(value)])
        raise ConfigError(f"{what!r}: {place} has no function {name!r}.{hint}")
    if not callable(found):
        raise ConfigError(f"{what!r} is {kind_of(found)}, not a function.")
    return UserFunction(what, found, _code_digest(found))


def _load_file(place: str, what: str) -> ModuleType:
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"{what!r}: there is no file {place!r}.")
    name = f"trimtab_user_{sha256_of(path)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what!r}: {place} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look themselves up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{what!r}: {place} cannot be run: {type(error).__name__}: {error}"
        ) from error
    return module


def _load_module(place: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what!r}: no module {error.name!r}. For a file, write its path: ./file.py:function."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{what!r}: the module cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _code_digest(function: Callable[..., Any]) -> str:
    """Of the file that holds a function; of its code, where there is none."""
    inner = inspect.unwrap(function)
    try:
        path = inspect.getsourcefile(inner)
    except TypeError:  # written in C
        path = None
    if path is not None and Path(path).is_file():
        return sha256_of(Path(path))
    if not inspect.isfunction(inner):
        return hashlib.sha256(repr(type(inner)).encode()).hexdigest()
    constants = [value for value in inner.__code__.co_consts if not inspect.iscode(value)]
    return hashlib.sha256(inner.__code__.co_code + repr(constants).encode()).hexdigest()


@final
class Mapped(Source):
    """``source`` with its rows renamed, thinned, filtered and mapped, in that order.

    Args:
        source: Any source.
        columns: ``{our name: their name}``. Only the columns that are named here are taken.
        ignore: Names of columns to leave out; with ``columns`` there is nothing left to ignore.
        filter: A function of a row (a dict) that says whether it is used.
        map: A function of a row that returns a dict, a list of dicts, or None to drop it.

    The ``index`` of a row stays that of the row in ``source``, and ``part`` counts what `map` made of
    it, so `rows` and `following` resume exactly. ``dropped`` counts the rows that the functions dropped
    since the last call of `rows`. A function that raises makes a fault of the row.
    """

    def __init__(
        self,
        source: Source,
        *,
        columns: Mapping[str, str] | None = None,
        ignore: Sequence[str] = (),
        filter: str | Callable[[dict[str, Any]], Any] | None = None,
        map: str | Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        if columns and ignore:
            raise ConfigError("'columns' takes the named columns alone; drop 'ignore' beside it.")
        self.source = source
        self._columns = dict(columns or {})
        self._ignore = frozenset(ignore)
        self._filter = None if filter is None else load_function(filter)
        self._map = None if map is None else load_function(map)
        functions = [function for function in (self._filter, self._map) if function is not None]
        self.dropped = 0
        self.name = source.name
        self.notes = source.notes
        self.certain = source.certain
        self.count = None if functions else source.count
        self.kind = "; ".join([source.kind, *(f"through {f.name}" for f in functions)])
        self.digest = hashlib.sha256(
            json.dumps(
                [
                    source.digest,
                    sorted(self._columns.items()),
                    sorted(self._ignore),
                    [
                        f and [f.name.rpartition(":")[2], f.digest]
                        for f in (self._filter, self._map)
                    ],
                ]
            ).encode()
        ).hexdigest()

    def rows(self, start: int = 0) -> Iterator[Row]:
        self.dropped = 0
        for row in self.source.rows(start):
            if row.fault:
                yield row
                continue
            try:
                values = self._changed(row.value)
            except DataError as error:
                yield replace(row, value=None, fault=str(error))
                continue
            if not values:
                self.dropped += 1
            for part, value in enumerate(values):
                yield replace(row, value=value, part=part)

    def _changed(self, value: object) -> list[object]:
        """What becomes of one row: none, one or several."""
        if not isinstance(value, Mapping):
            raise DataError(f"expected an object, found {kind_of(value)}.")
        row = self._renamed(value)
        if self._filter is None and self._map is None:
            return [row]
        row = deepcopy(row)  # theirs to change; a source may hold its rows in memory
        if self._filter is not None and not _called(self._filter, "filter", row):
            return []
        if self._map is None:
            return [row]
        made = _called(self._map, "map", row)
        if made is None:
            return []
        several = list(made) if isinstance(made, list | tuple) else [made]
        for one in several:
            if not isinstance(one, Mapping):
                raise DataError(
                    f"the map function {self._map.name} returned {kind_of(one)}; it must return a "
                    "dict, a list of dicts, or None."
                )
        return several

    def _renamed(self, value: Mapping[str, Any]) -> dict[str, Any]:
        if not self._columns:
            return {key: inner for key, inner in value.items() if key not in self._ignore}
        missing = [theirs for theirs in self._columns.values() if theirs not in value]
        if missing:
            raise DataError(
                f"there is no column {missing[0]!r}.{suggest(missing[0], map(str, value))} "
                f"The row has {', '.join(map(str, value)) or 'none'}."
            )
        return {ours: value[theirs] for ours, theirs in self._columns.items()}


def _called(function: UserFunction, what: str, row: dict[str, Any]) -> Any:
    try:
        return function.call(row)
    except Exception as error:
        raise DataError(
            f"the {what} function {function.name} raised {type(error).__name__}: {error}"
        ) from error
