"""A tokenizer's chat template: rendered text, and which characters of it the assistant says.

See `trimtab.data.render` for the three ways in which a span is found, and why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from trimtab.data.records import Message
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


class Template:
    """The chat template of ``tokenizer``. Raises `ModelError` if it has none to use by default."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        try:
            self._source: str = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, and none is the default
            raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from error
        self.marked = MARKS.search(self._source) is not None
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._controls = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._endings = self._find_endings()

    def text(self, messages: Sequence[Message], *, answer: bool = False, origin: str = "") -> str:
        """The conversation as text; ``answer``: with the generation prompt at the end."""
        try:
            text = self._tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=answer
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{origin}: the chat template refuses it: {error}") from error
        return str(text)

    def spans(
        self, text: str, messages: Sequence[Message], *, only_last: bool, origin: str
    ) -> list[Span]:
        """The spans of the assistant turns in ``text``, the rendering of ``messages``, in order.

        Each holds the answer and what ends the turn. Raises `DataError` where one cannot be told.
        """
        turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if self.marked:
            spans = self._by_marks(text, messages, turns, only_last, origin)
        else:
            chosen = turns[-1:] if only_last else turns
            spans = [self._of_turn(text, messages, turn, origin) for turn in chosen]
        for before, after in pairwise(spans):
            if after.start < before.stop:
                raise DataError(f"{origin}: two assistant turns overlap in the rendered text.")
        return spans

    def _by_marks(
        self,
        text: str,
        messages: Sequence[Message],
        turns: list[int],
        only_last: bool,
        origin: str,
    ) -> list[Span]:
        rendered, marks = render_jinja_template(
            conversations=[_plain(messages)],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise DataError(f"{origin}: the template renders another text with generation marks.")
        ends = [self._through_ending(text, start, stop) for start, stop in marks[0]]
        if len(ends) == len(turns):
            spans = [
                Span(start, stop, messages[turn].weight)
                for turn, (start, stop) in zip(turns, ends, strict=True)
            ]
            return spans[-1:] if only_last else spans
        # A turn may have several marks (thought and answer) or none; then a turn's own weight has no place.
        if only_last or any(messages[turn].weight != 1.0 for turn in turns):
            raise DataError(
                f"{origin}: the template marks {len(ends)} spans for {len(turns)} assistant turns, so "
                "weights of messages, or training the last turn only, cannot be told apart."
            )
        return [Span(start, stop, 1.0) for start, stop in ends]

    def _of_turn(self, text: str, messages: Sequence[Message], turn: int, origin: str) -> Span:
        weight = messages[turn].weight
        head = self.text(messages[:turn], answer=True, origin=origin)
        through = self.text(messages[: turn + 1], origin=origin)
        if through.startswith(head) and text.startswith(through):
            stop = self._trimmed(through, len(head))
            if text[len(head) : stop].strip():
                return Span(len(head), stop, weight)
        start, stop = self._by_substitution(text, messages, turn, origin)
        _, stop = self._through_ending(text, start, stop)
        return Span(start, stop, weight)

    def _by_substitution(
        self, text: str, messages: Sequence[Message], turn: int, origin: str
    ) -> tuple[int, int]:
        """Where the content of that turn lies in ``text``: where it differs when the content does."""
        changed = list(messages)
        changed[turn] = Message("assistant", MARKER)
        other = self.text(changed, origin=origin)
        if other.count(MARKER) == 1:
            start = other.index(MARKER)
            after = other[start + len(MARKER) :]
            stop = len(text) - len(after)
            if text.startswith(other[:start]) and text.endswith(after) and start < stop:
                return start, stop
        raise DataError(
            f"{origin}: message {turn + 1} (assistant) cannot be found in what the chat template "
            "renders, so it cannot be told which tokens to train. Give the template generation marks, "
            "split the conversation, or use train='last'."
        )

    def _find_endings(self) -> list[str]:
        """What the template writes after an answer, as learnt from a small conversation."""
        endings = [str(self._tokenizer.eos_token)] if self._tokenizer.eos_token else []
        try:
            text = self.text([Message("user", "a"), Message("assistant", MARKER)])
        except DataError:
            return endings
        if MARKER in text:
            after = text.index(MARKER) + len(MARKER)
            endings.insert(0, text[after : self._trimmed(text, after)])
        return [ending for ending in endings if ending]

    def _through_ending(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """The span with the end of turn that follows it, and without white space after that."""
        trimmed = self._trimmed(text[:stop], start)
        if trimmed < stop or any(text.endswith(end, start, stop) for end in self._endings):
            return start, trimmed
        for ending in self._endings:
            if text.startswith(ending, stop):
                return start, stop + len(ending)
        return start, stop

    def _trimmed(self, text: str, start: int) -> int:
        """The end of ``text`` without white space that follows a control token (no one says it)."""
        stop = start + len(text[start:].rstrip())
        ends_turn = any(text.endswith(control, start, stop) for control in self._controls)
        return stop if ends_turn else len(text)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in messages]
