"""Which pages are whose, and which hold the beginnings of texts that may come again.

A full page is known by what it holds: the tokens in it, and all that stands before them, down to a root that names who
acted (adapters, their versions, a salt). So nothing read by one adapter is ever found by another. A page that nobody
reads any more is kept until its room is needed; the one left longest ago goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import count

Key = tuple[Hashable, tuple[int, ...]]
"""What stands before a page (a root, or the number of a page's content), and its tokens."""


class Ledger:
    """Readers and contents of ``pages`` pages of ``size`` positions."""

    def __init__(self, pages: int, size: int) -> None:
        self.pages = pages
        self.size = size
        self._free = list(range(pages))
        self._readers = [0] * pages
        self._content: dict[int, tuple[Key, int]] = {}
        """Page -> its key, and the number of its content."""
        self._known: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Pages with a known content that nobody reads, the one left longest ago first."""
        self._numbers = count()

    @property
    def room(self) -> int:
        """How many pages may be taken."""
        return len(self._free) + len(self._idle)

    @property
    def read(self) -> int:
        """How many pages have readers."""
        return self.pages - self.room

    def take(self, number: int) -> list[int]:
        """So many pages for one reader; the caller has looked at `room`."""
        return [self._one() for _ in range(number)]

    def _one(self) -> int:
        if self._free:
            page = heapq.heappop(self._free)  # low ones first: pages in use lie close together
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._readers[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more reader of pages that have readers, or a known content."""
        for page in pages:
            self._readers[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One reader less. The end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self._readers[page] -= 1
            if self._readers[page]:
                continue
            if page in self._content:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)

    def own(self, pages: Sequence[int]) -> list[int]:
        """Those of a reader's pages that nobody else reads, or may find."""
        return [p for p in pages if self._readers[p] == 1 and p not in self._content]

    def find(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the longest known beginning of a text, but not all of it."""
        found: list[int] = []
        before: Hashable = root
        for start in range(0, len(tokens) - self.size, self.size):
            page = self._known.get((before, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            found.append(page)
            before = self._content[page][1]
        return found

    def keep(self, root: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Make the full pages of a text known. What is known already stays where it is."""
        before: Hashable = root
        for number in range(len(tokens) // self.size):
            key = before, tuple(tokens[number * self.size : (number + 1) * self.size])
            page = self._known.get(key)
            if page is None:
                page = pages[number]
                if page in self._content:  # it is known as something else
                    return
                self._known[key] = page
                self._content[page] = key, next(self._numbers)
            before = self._content[page][1]

    def forget(self) -> None:
        """Drop all known contents; pages that are read go on being read."""
        for page in list(self._content):
            self._forget(page)
        for page in self._idle:
            heapq.heappush(self._free, page)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        key, _ = self._content.pop(page)
        del self._known[key]
