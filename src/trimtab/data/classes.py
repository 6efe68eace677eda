"""Labelled texts for a classification head: the ids of a text, with the number of its class after them.

The text is encoded as the tokenizer does by itself, with the special tokens that a model's head was made to
see around it ([CLS] … [SEP]); a text that is too long loses tokens of its own and keeps those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from trimtab.data.datum import Datum
from trimtab.data.encode import Encoder
from trimtab.data.labelled import class_number
from trimtab.data.records import LabelledRecord, Record
from trimtab.data.render import Rendered, tokenizer_parts
from trimtab.data.shapes import parse_row
from trimtab.data.source import Source
from trimtab.errors import ConfigError, DataError

MOST_LABELS = 1000


class ClassRenderer:
    """Renders labelled records for one tokenizer; ``labels`` are the names of the classes, in order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.labels = tuple(labels)
        if len(set(self.labels)) < 2 or len(set(self.labels)) < len(self.labels):
            raise ConfigError(f"a classifier needs two labels or more, each once; not {labels!r}.")
        self._encoder = Encoder(tokenizer)
        self._opening, self._closing = self._special_tokens()

    def require(self, record: Record) -> None:
        """Raise `ConfigError` for records that have no label to learn."""
        if not isinstance(record, LabelledRecord):
            raise ConfigError(
                f"{record.origin}: a classification head learns from labelled texts (text, label), and this is "
                f"{record.shape}."
            )
        if record.label is None:
            raise ConfigError(
                f"{record.origin}: a pair of texts without a label has nothing to learn."
            )
        if isinstance(record.label, float):
            raise ConfigError(
                f"{record.origin}: the label {record.label!r} is no class; heads that learn numbers are not here yet."
            )

    def render(self, record: Record) -> Rendered:
        """The ids of a text, and its class. Raises `DataError` for a label that is none of the known ones."""
        self.require(record)
        assert isinstance(record, LabelledRecord)
        number = class_number(record, self.labels)
        ids = self._ids(record)
        return Rendered((*ids, number), (*(0.0 for _ in ids), 1.0), record.origin)

    def shortened(self, datum: Datum, context: int, side: str) -> Datum:
        """``datum`` in ``context`` tokens: its text loses its ``left`` or ``right`` end."""
        first, last = len(self._opening), len(datum) - len(self._closing)
        text = datum.tokens[first:last]
        room = max(context - len(self._opening) - len(self._closing), 0)
        kept = text[len(text) - room :] if side == "left" else text[:room]
        ids = (*datum.tokens[:first], *kept, *datum.tokens[last:])
        return Datum.classified(ids, datum.targets[-1], origin=datum.origin)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides token ids and classes; the same in every process."""
        parts = ["classes", self.labels, *tokenizer_parts(self.tokenizer)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _ids(self, record: LabelledRecord) -> list[int]:
        if not record.text_pair:
            return [*self._opening, *self._encoder.ids(record.text), *self._closing]
        found = self.tokenizer(
            record.text, record.text_pair, return_token_type_ids=True, verbose=False
        )
        if any(found["token_type_ids"]):
            raise DataError(
                f"{record.origin}: this model tells the two texts of a pair apart by token types, which is not "
                "here yet; join them into one text."
            )
        ids: list[int] = found["input_ids"]
        return ids

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        whole = list(self.tokenizer("a", verbose=False)["input_ids"])
        bare = self._encoder.ids("a")
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        return [], []


def labels_in(sources: Iterable[Source]) -> tuple[str, ...]:
    """The different labels of labelled texts, in order: of numbers if all are, else of letters.

    Raises:
        DataError: fewer than two, or more than `MOST_LABELS`; rows that cannot be read are passed over.
        ConfigError: rows of another kind.
    """
    found: set[str] = set()
    name = ""
    for source in sources:
        name = source.name
        for row in source.rows(0):
            try:
                record = parse_row(row)
            except DataError:
                continue  # counted, or an error, when the rows are read
            if isinstance(record, LabelledRecord) and isinstance(record.label, str | int):
                found.add(str(record.label))
            if len(found) > MOST_LABELS:
                raise DataError(
                    f"{name} has more than {MOST_LABELS:,} different labels; a classifier needs few."
                )
    if len(found) < 2:
        raise DataError(
            f"{name}: a classifier needs labelled texts (text, label) with two labels or more; found "
            f"{', '.join(found) or 'none'}."
        )
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if numbers else str))
