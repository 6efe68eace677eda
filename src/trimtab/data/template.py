"""A tokenizer's chat template: rendered text, and which characters of it the assistant says.

Tools and calls of them are the template's to write. What a template would leave out in silence (tools,
calls, thoughts that it knows nothing of) is an error.

See `trimtab.data.render` for the three ways in which a span is found, and why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trimtab.data.messages import Message, Tools
from trimtab.errors import DataError, ModelError

# Characters for private use: no text holds them, and no template treats them specially.
MARKER = "\ue1a5\ue1a6\ue1a7"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters ``start`` to ``stop`` that are trained with ``weight``."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Chat:
    """A rendered conversation; ``marks`` are the characters that the template says are generated."""

    messages: Sequence[Message]
    tools: Tools
    origin: str
    text: str
    marks: tuple[tuple[int, int], ...] | None


class Template:
    """The chat template of ``tokenizer``. Raises `ModelError` if it has none to use by default."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        try:
            self._sources = (
                str(tokenizer.get_chat_template()),
                str(tokenizer.get_chat_template(tools=[{}])),  # some have another one for tools
            )
        except ValueError as error:  # several named templates, and none is the default
            raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from error
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        controls = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._controls = tuple(controls)
        self._lead, self._endings = self._find_surroundings()

    @property
    def sources(self) -> tuple[str, str]:
        """The template in Jinja, without tools and with tools (mostly the same)."""
        return self._sources

    def text(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        answer: bool = False,
        origin: str = "",
    ) -> str:
        """The conversation as text; ``answer``: with the generation prompt at the end."""
        plain = self._plain(messages, tools, origin)
        try:
            text = self._tokenizer.apply_chat_template(
                plain,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=answer,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{origin}: the chat template refuses it: {error}") from error
        return str(text)

    def render(self, messages: Sequence[Message], tools: Tools, origin: str) -> Chat:
        """The whole conversation, with its generation marks where the template has them."""
        source = self._sources[bool(tools)]
        if MARKS.search(source) is None:
            text = self.text(messages, tools=tools, origin=origin)
            return Chat(messages, tools, origin, text, None)
        plain = self._plain(messages, tools, origin)
        try:
            rendered, marks = render_jinja_template(
                conversations=[plain],
                tools=list(tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{origin}: the chat template refuses it: {error}") from error
        return Chat(messages, tools, origin, rendered[0], tuple(marks[0]))

    def spans(self, chat: Chat, *, only_last: bool) -> list[Span]:
        """The spans of the assistant turns in the text, in order.

        Each holds the answer and what ends the turn. Raises `DataError` where one cannot be told.
        """
        turns = [place for place, turn in enumerate(chat.messages) if turn.role == "assistant"]
        if chat.marks is not None:
            spans = self._by_marks(chat, chat.marks, turns, only_last)
        else:
            chosen = turns[-1:] if only_last else turns
            spans = [self._of_turn(chat, turn) for turn in chosen]
        for before, after in pairwise(spans):
            if after.start < before.stop:
                raise DataError(f"{chat.origin}: two assistant turns overlap in the rendered text.")
        return spans

    def _by_marks(
        self, chat: Chat, marks: tuple[tuple[int, int], ...], turns: list[int], only_last: bool
    ) -> list[Span]:
        ends = [self._through_ending(chat.text, start, stop) for start, stop in marks]
        if len(ends) == len(turns):
            spans = [
                Span(start, stop, chat.messages[turn].weight)
                for turn, (start, stop) in zip(turns, ends, strict=True)
            ]
            return spans[-1:] if only_last else spans
        # A turn may have several marks (thought and answer) or none; then a turn's own weight has no place.
        if only_last or any(chat.messages[turn].weight != 1.0 for turn in turns):
            raise DataError(
                f"{chat.origin}: the template marks {len(ends)} spans for {len(turns)} assistant turns, "
                "so weights of messages, or training the last turn only, cannot be told apart."
            )
        return [Span(start, stop, 1.0) for start, stop in ends]

    def _of_turn(self, chat: Chat, turn: int) -> Span:
        messages, text = chat.messages, chat.text
        weight = messages[turn].weight
        head = self.text(messages[:turn], tools=chat.tools, answer=True, origin=chat.origin)
        through = text
        if turn + 1 < len(messages):
            through = self.text(messages[: turn + 1], tools=chat.tools, origin=chat.origin)
        if through.startswith(head) and text.startswith(through):
            stop = self._trimmed(through, len(head))
            if text[len(head) : stop].strip():
                return Span(len(head), stop, weight)
        start, stop = self._by_substitution(chat, turn)
        _, stop = self._through_ending(text, start, stop)
        return Span(start, stop, weight)

    def _by_substitution(self, chat: Chat, turn: int) -> tuple[int, int]:
        """Where the content of that turn lies in the text: where it differs when the content does."""
        text = chat.text
        # Calls and thoughts go, so that the span holds them; the content alone is replaced.
        other = self._with(chat, turn, Message("assistant", MARKER))
        if other.count(MARKER) == 1:
            start = other.index(MARKER)
            after = other[start + len(MARKER) :]
            stop = len(text) - len(after)
            if text.startswith(other[:start]) and text.endswith(after) and start < stop:
                led = text.endswith(self._lead, 0, start)
                return start - (len(self._lead) if led else 0), stop
        found = self._by_call(chat, turn) if chat.messages[turn].tool_calls else None
        if found is None:
            raise DataError(
                f"{chat.origin}: message {turn + 1} (assistant) cannot be found in what the chat "
                "template renders, so it cannot be told which tokens to train. Give the template "
                "generation marks, split the conversation, or use train='last'."
            )
        return found

    def _by_call(self, chat: Chat, turn: int) -> tuple[int, int] | None:
        """Where a turn that calls tools lies, if it reads as it does when it is the only one.

        The place is where the text differs when the name of the first call does.
        """
        message, asked = chat.messages[turn], Message("user", "a")
        calls = (replace(message.tool_calls[0], name=MARKER), *message.tool_calls[1:])
        marked = replace(message, tool_calls=calls)
        small = Chat((asked, message), chat.tools, chat.origin, "", None)
        head = self.text([asked], tools=chat.tools, answer=True, origin=chat.origin)
        alone, alone_marked = self._with(small, 1, message), self._with(small, 1, marked)
        other = self._with(chat, turn, marked)
        if not alone.startswith(head) or not alone_marked.count(MARKER) == other.count(MARKER) == 1:
            return None
        answer = alone[len(head) : self._trimmed(alone, len(head))]
        start = other.index(MARKER) - alone_marked.index(MARKER) + len(head)
        return (start, start + len(answer)) if chat.text.startswith(answer, start) else None

    def _with(self, chat: Chat, turn: int, message: Message) -> str:
        """The text with another message as that turn; empty where the template refuses it."""
        changed = list(chat.messages)
        changed[turn] = message
        try:
            return self.text(changed, tools=chat.tools, origin=chat.origin)
        except DataError:
            return ""

    def _find_surroundings(self) -> tuple[str, tuple[str, ...]]:
        """What the template writes before an answer though it is not in the generation prompt (a
        space, mostly), and what after it; as learnt from a small conversation."""
        lead, endings = "", [str(self._tokenizer.eos_token)] if self._tokenizer.eos_token else []
        asked = Message("user", "a")
        try:
            head = self.text([asked], answer=True)
            text = self.text([asked, Message("assistant", MARKER)])
        except DataError:
            return lead, tuple(endings)
        if MARKER in text:
            start = text.index(MARKER)
            if text.startswith(head):
                lead = text[len(head) : start]
            after = start + len(MARKER)
            endings.insert(0, text[after : self._trimmed(text, after)])
        return lead, tuple(ending for ending in endings if ending)

    def _through_ending(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """The span with the end of turn that follows it, and without white space after that."""
        trimmed = self._trimmed(text[:stop], start)
        if trimmed < stop or text.endswith(self._endings, start, stop):
            return start, trimmed
        for ending in self._endings:
            if text.startswith(ending, stop):
                return start, stop + len(ending)
        return start, stop

    def _trimmed(self, text: str, start: int) -> int:
        """The end of ``text`` without white space that follows a control token (no one says it)."""
        stop = start + len(text[start:].rstrip())
        ends_turn = text.endswith(self._controls, start, stop)
        return stop if ends_turn else len(text)

    def _plain(
        self, messages: Sequence[Message], tools: Tools, origin: str
    ) -> list[dict[str, Any]]:
        """The messages as templates take them. Raises `DataError` for what this one would leave out."""
        source = self._sources[bool(tools)]
        if tools and "tools" not in source:
            raise DataError(
                f"{origin}: the record declares tools, and the model's chat template knows none; "
                "use a model made for tools, or leave them out."
            )
        return [_plain(message, source, origin) for message in messages]


def _plain(message: Message, source: str, origin: str) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "developer" and "developer" not in source:
        plain["role"] = "system"
    for value, key in (
        (message.tool_calls, "tool_calls"),
        (message.reasoning, "reasoning_content"),
    ):
        if value and key not in source:
            raise DataError(
                f"{origin}: a message has {key}, which the model's chat template does not render; "
                "use a model made for it, or leave it out."
            )
    if message.name:
        plain["name"] = message.name
    if message.reasoning:
        plain["reasoning_content"] = message.reasoning
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain
