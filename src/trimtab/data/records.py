"""What a row says, whatever its file and its keys: seven kinds of record.

Each has an ``origin`` (``file:line``), a ``shape`` (the name of the keys it was read from) and a
``key``, a hash of its text that tells duplicates, overlaps and splits: letters are folded (NFKC, case,
white space), so that it depends on no tokenizer and no template. `trimtab.data.shapes` reads them.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from trimtab.data.messages import Message, Tools

Label = str | int | float


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """A conversation that ends with the assistant, and the tools that it may call."""

    messages: tuple[Message, ...]
    origin: str = ""
    tools: Tools = ()
    shape: str = field(default="chat", compare=False)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        return _hash([*_said(self.messages), *map(_json, self.tools)])


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """A prompt and what should follow it."""

    prompt: str
    completion: str
    origin: str = ""
    shape: str = field(default="prompt/completion", compare=False)

    def as_chat(self) -> ChatRecord:
        """The same as one user turn and one assistant turn."""
        turns = (Message("user", self.prompt), Message("assistant", self.completion))
        return ChatRecord(turns, self.origin, shape=self.shape)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        return _hash([self.prompt, self.completion])


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """A conversation, a better and a worse way to go on from it."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    origin: str = ""
    tools: Tools = ()
    shape: str = field(default="preference", compare=False)

    def as_chat(self) -> ChatRecord:
        """The prompt and the chosen answer, which alone is trained."""
        turns = (*untrained(self.prompt), *self.chosen)
        return ChatRecord(turns, self.origin, self.tools, self.shape)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        sides = (self.prompt, self.chosen, self.rejected)
        return _hash([*(text for side in sides for text in ("\0", *_said(side)))])


@dataclass(frozen=True, slots=True)
class UnpairedRecord:
    """A conversation, and whether its end is desired (as KTO has them)."""

    messages: tuple[Message, ...]
    desired: bool
    origin: str = ""
    tools: Tools = ()
    shape: str = field(default="unpaired preference", compare=False)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        return _hash([*_said(self.messages), str(self.desired)])


@dataclass(frozen=True, slots=True)
class LabelledRecord:
    """A text, or a pair of texts, with a label (None: a pair without one)."""

    text: str
    label: Label | None
    text_pair: str = ""
    origin: str = ""
    shape: str = field(default="labelled text", compare=False)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        return _hash([self.text, self.text_pair, repr(self.label)])


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A document."""

    text: str
    origin: str = ""
    shape: str = field(default="text", compare=False)

    def key(self) -> bytes:
        """16 bytes that two records share if they say the same."""
        return _hash([self.text])


Record = (
    ChatRecord | CompletionRecord | PreferenceRecord | UnpairedRecord | LabelledRecord | TextRecord
)


def untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same turns, the assistant's with weight 0."""
    return tuple(
        replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in messages
    )


def _said(messages: Iterable[Message]) -> Iterator[str]:
    for message in messages:
        if message.reasoning:
            yield message.reasoning
        if message.content or not message.tool_calls:
            yield message.content
        for call in message.tool_calls:
            yield call.name
            yield _json(call.arguments)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)


def _hash(texts: Iterable[str]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for text in texts:
        folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
        content.update(" ".join(folded.casefold().split()).encode())
        content.update(b"\0")
    return content.digest()
