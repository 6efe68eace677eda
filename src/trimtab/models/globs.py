"""Globs over module paths."""

from __future__ import annotations

import re


def glob_match(pattern: str, path: str) -> bool:
    """``*`` matches within a segment, ``**.`` any number of leading segments (none included)."""
    return _compiled(pattern).fullmatch(path) is not None


_PATTERNS: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _PATTERNS:
        text = re.escape(pattern).replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*\*", ".*")
        text = text.replace(r"\*", r"[^.]*").replace(r"\?", "[^.]")
        _PATTERNS[pattern] = re.compile(text)
    return _PATTERNS[pattern]
