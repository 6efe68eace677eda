"""Records to token ids with a weight for each token: the chat template and the loss mask.

The same template makes the text that is trained on and, in `Renderer.prompt`, the text that is
answered. Which characters are trained is found for each conversation by itself:

1. by the template's own generation marks, where it has them;
2. else by prefix difference: the text rendered up to the turn, with the generation prompt, must be a
   prefix of the whole text. What follows it up to the end of turn is what the model has to say;
3. else (a template that counts turns, or edits earlier ones) by substitution: render again with the
   answer replaced by a marker, and see where the texts differ.

The characters become tokens by one more check: the text before a trained span, encoded alone, must
be a prefix of all tokens, because it alone is what the model is given when it answers. Where a token
straddles the border, the pieces are encoded apart.

A labelled text becomes a question by the instruction of the configuration, and its label the answer.
A plain text is trained as a whole, whatever else is.

The token that ends an assistant's turn is trained, also where the padding token has the same id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from trimtab.data.datum import Datum
from trimtab.data.encode import Encoder
from trimtab.data.labelled import as_question, check_kind, question
from trimtab.data.messages import Message, check_roles, parse_tools
from trimtab.data.records import (
    ChatRecord,
    CompletionRecord,
    LabelledRecord,
    PreferenceRecord,
    Record,
    TextRecord,
)
from trimtab.data.render_config import RenderConfig
from trimtab.data.template import Span, Template
from trimtab.errors import ConfigError, DataError, ModelError


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a whole example, and how much each is to be learnt (one length)."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    origin: str = ""

    def datum(self) -> Datum:
        """Shifted: each token beside the one that follows it."""
        if len(self.ids) < 2:
            raise DataError(
                f"{self.origin}: {len(self.ids)} tokens; an example needs at least two."
            )
        return Datum.causal(self.ids, self.weights, origin=self.origin)


class Renders(Protocol):
    """What makes examples of records: for generators `Renderer`, for classifiers `ClassRenderer`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    def require(self, record: Record) -> None:
        """Raise what concerns every record of its kind."""

    def render(self, record: Record) -> Rendered:
        """Ids and weights of a record. Raises `DataError` that names it."""
        ...

    def shortened(self, datum: Datum, context: int, side: str) -> Datum:
        """``datum`` in ``context`` tokens, cut at its ``left`` or ``right`` end."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of all that decides token ids and weights; the same in every process."""
        ...


class Renderer:
    """Renders records for one tokenizer. Stateless after construction."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RenderConfig | None = None
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.config = config or RenderConfig()
        self.template = Template(tokenizer) if tokenizer.chat_template else None
        if self.config.completions == "chat" and self.template is None:
            raise ConfigError(
                "completions='chat' needs a tokenizer with a chat template, and this one has none; "
                "use completions='plain'."
            )
        self._encoder = Encoder(tokenizer)
        begin = tokenizer.bos_token_id
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        # The begin-of-sequence token, where this tokenizer adds one to plain text by itself.
        self._opening = [begin] if begin is not None and first == [begin] else []

    @property
    def chats_completions(self) -> bool:
        """Whether prompt/completion records become a chat turn."""
        return self.config.completions != "plain" and self.template is not None

    def require(self, record: Record) -> None:
        """Raise what concerns every record of its kind: a missing template, policy or end token."""
        if isinstance(record, ChatRecord | PreferenceRecord):
            _ = self._chat_template
        elif not self.chats_completions or isinstance(record, TextRecord):
            _ = self._end
        check_kind(record, self.config)

    def render(self, record: Record) -> Rendered:
        """Ids and weights of a record. Raises `DataError` that names it where no exact mask is found."""
        self.require(record)
        if isinstance(record, TextRecord):
            ids = [*self._opening, *self._encoder.ids(record.text), self._end]
            return Rendered(tuple(ids), (1.0,) * len(ids), record.origin)
        if isinstance(record, LabelledRecord):
            record = as_question(record, self.config)
        if isinstance(record, CompletionRecord):
            if not self.chats_completions:
                return self._plain(record)
            record = record.as_chat()
        elif isinstance(record, PreferenceRecord):
            record = record.as_chat()
        assert isinstance(record, ChatRecord)  # check_kind has refused the others
        return self._chat(record)

    def prompt(
        self, messages: Sequence[Message] | str, *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The ids to answer: a conversation that ends with the user (or a tool), or a plain text.

        Plain text is made a user turn exactly where prompts of prompt/completion records are.
        """
        if isinstance(messages, str):
            if not self.chats_completions:
                if tools:
                    raise DataError("tools need a chat, and this renderer takes plain text.")
                return [*self._opening, *self._encoder.ids(messages)]
            messages = [Message("user", messages)]
        check_roles(messages, "prompt", answered=False)
        text = self._chat_template.text(
            messages, tools=parse_tools(list(tools), "prompt"), answer=True, origin="prompt"
        )
        return self._encoder.ids(text)

    def question(self, text: str, text_pair: str = "") -> str:
        """The prompt that asks for the label of a text: what a labelled record is trained with."""
        return question(text, text_pair, self.config)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides token ids and weights; the same in every process."""
        parts: list[object] = [self.config.model_dump(mode="json"), self._opening]
        parts.append(self.template.sources if self.template is not None else None)
        parts += tokenizer_parts(self.tokenizer)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def shortened(self, datum: Datum, context: int, side: str) -> Datum:
        """``datum`` in ``context`` tokens, without what its ``left`` or ``right`` end has more."""
        over = len(datum) - context
        keep = slice(over, None) if side == "left" else slice(None, -over)
        return Datum(datum.tokens[keep], datum.targets[keep], datum.weights[keep], datum.origin)

    @property
    def _chat_template(self) -> Template:
        if self.template is None:
            raise DataError(
                "these are chat messages, and the tokenizer has no chat template. Use the model's "
                "instruct variant, set tokenizer.chat_template, or give prompt/completion records."
            )
        return self.template

    @property
    def _end(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so a completion could not learn to stop; "
                "set tokenizer.eos_token."
            )
        return end

    def _chat(self, record: ChatRecord) -> Rendered:
        template = self._chat_template
        if self.config.train == "all":
            text = template.text(record.messages, tools=record.tools, origin=record.origin)
            whole = self._encoder.ids(text)
            return Rendered(tuple(whole), (1.0,) * len(whole), record.origin)
        chat = template.render(record.messages, record.tools, record.origin)
        spans = template.spans(chat, only_last=self.config.train == "last")
        ids, weights = self._mask(chat.text, spans, record.origin)
        return Rendered(tuple(ids), tuple(weights), record.origin)

    def _plain(self, record: CompletionRecord) -> Rendered:
        """Prompt and completion as they are, then the end-of-sequence token, which is trained."""
        text = record.prompt + record.completion
        first = 0 if self.config.train == "all" else len(record.prompt)
        ids, weights = self._mask(text, [Span(first, len(text), 1.0)], record.origin)
        opening = self._opening
        return Rendered(
            (*opening, *ids, self._end), (*(0.0 for _ in opening), *weights, 1.0), record.origin
        )

    def _mask(self, text: str, spans: Sequence[Span], origin: str) -> tuple[list[int], list[float]]:
        """Ids of ``text``, and for each the weight of the span that it lies in (else 0)."""
        ids = self._encoder.ids(text)
        weights = [0.0] * len(ids)
        places = [place for span in spans for place in (span.start, span.stop)]
        borders = self._encoder.borders(text, ids, places)
        for span, start, stop in zip(spans, borders[::2], borders[1::2], strict=True):
            if start is None or stop is None:
                return self._mask_by_pieces(text, spans, ids, origin)
            weights[start:stop] = [span.weight] * (stop - start)
        return ids, weights

    def _mask_by_pieces(
        self, text: str, spans: Sequence[Span], whole: list[int], origin: str
    ) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        place = 0
        for span in spans:
            for start, stop, weight in (
                (place, span.start, 0.0),
                (span.start, span.stop, span.weight),
            ):
                piece = self._encoder.ids(text[start:stop])
                ids += piece
                weights += [weight] * len(piece)
            place = span.stop
        tail = self._encoder.ids(text[place:])
        ids += tail
        weights += [0.0] * len(tail)
        if self._decoded(ids) != self._decoded(whole):
            raise DataError(
                f"{origin}: one token holds the end of the prompt and the start of the answer, and "
                "this tokenizer cannot encode them apart. Move the white space between them from the "
                "end of the prompt to the start of the answer."
            )
        return ids, weights

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """All of a tokenizer that decides ids, as JSON holds it."""
    parts: list[object] = [
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ]
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({**core, "truncation": None, "padding": None})  # state of the last call
    else:
        parts += [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return parts
