"""Patterns on the ends of paths, by which a site has a rank, or another option, of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.errors import ConfigError, TargetError


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of ``path``, on whole segments."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    return default


def check_patterns(paths: Sequence[str], *several: Mapping[str, Any]) -> None:
    """Refuse a pattern that matches none of the targets.

    Raises:
        TargetError: such a pattern.
    """
    for pattern in [pattern for patterns in several for pattern in patterns]:
        if not any(pattern_value({pattern: True}, path, False) for path in paths):
            raise TargetError(f"pattern {pattern!r} matches none of the {len(paths)} targets.")


def exactly(path: str, paths: Iterable[str]) -> str:
    """A pattern for this path alone: patterns match the ends of paths, unless they begin with ^."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path
