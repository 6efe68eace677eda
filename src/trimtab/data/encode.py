"""Text to token ids, and how many of the ids a prefix of the text has.

A tokenizer cuts text at its added tokens (``<|im_end|>``, …) first, and encodes what lies between them
apart. So the ids of a prefix are those up to the last added token in it, and then those of the few
characters that follow, which are the same in every example and are kept.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

SHORT = 64  # characters: a longer piece is hardly seen twice
KEPT = 10_000


class Encoder:
    """Encodes with ``tokenizer``, never adding tokens of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
        self._added = {text: number for text, number in added.items() if text}
        self._numbers = frozenset(self._added.values())
        longest_first = sorted(self._added, key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._pieces: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The ids of ``text`` alone."""
        if self._core is None or self._tokenizer.split_special_tokens:
            found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            return found
        # As the tokenizer itself does before each call, but for a tenth of the time.
        if self._core.truncation is not None:
            self._core.no_truncation()
        if self._core.padding is not None:
            self._core.no_padding()
        return list(self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def borders(self, text: str, ids: list[int], places: list[int]) -> list[int | None]:
        """How many of ``ids``, those of ``text``, each ``text[:place]`` has (None: a token straddles it)."""
        ends = self._added_tokens(text, ids)
        return [self._border(text, ids, place, ends) for place in places]

    def _border(
        self, text: str, ids: list[int], place: int, added: list[tuple[int, int, int]]
    ) -> int | None:
        if place == len(text):
            return len(ids)
        before = [found for found in added if found[1] <= place]
        start, _, index = before[-1] if before else (0, 0, 0)
        piece = self._piece(text[start:place])
        stop = index + len(piece)
        return stop if ids[index:stop] == piece else None

    def _piece(self, text: str) -> list[int]:
        if len(text) > SHORT:
            return self.ids(text)
        if text not in self._pieces:
            if len(self._pieces) >= KEPT:
                self._pieces.clear()
            self._pieces[text] = self.ids(text)
        return self._pieces[text]

    def _added_tokens(self, text: str, ids: list[int]) -> list[tuple[int, int, int]]:
        """(start, stop, index in ids) of the added tokens in ``text``; none if they cannot be matched."""
        written = [(match.start(), match.end()) for match in self._find.finditer(text)]
        indices = [index for index, number in enumerate(ids) if number in self._numbers]
        if [self._added[text[start:stop]] for start, stop in written] != [
            ids[index] for index in indices
        ]:
            return []
        return [(*place, index) for place, index in zip(written, indices, strict=True)]
