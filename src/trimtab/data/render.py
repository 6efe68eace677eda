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

The token that ends an assistant's turn is trained, also where the padding token has the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from trimtab.config import Config
from trimtab.data.datum import Datum
from trimtab.data.records import ChatRecord, CompletionRecord, Message, Record, check_roles
from trimtab.data.template import Span, Template
from trimtab.errors import ConfigError, DataError, ModelError


class RenderConfig(Config):
    """What is trained, and how prompt/completion records are rendered.

    ``train``: ``assistant`` (every assistant turn), ``last`` (the last one), ``completion`` (for data
    of prompt/completion records only), ``all`` (every token). ``completions``: as one ``chat`` turn by
    the template, as ``plain`` text, or ``auto`` (chat where the tokenizer has a template).
    """

    train: Literal["assistant", "last", "completion", "all"] = "assistant"
    completions: Literal["auto", "chat", "plain"] = "auto"


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


class Renderer:
    """Renders records for one tokenizer. Stateless after construction."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RenderConfig | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config or RenderConfig()
        self.template = Template(tokenizer) if tokenizer.chat_template else None
        if self.config.completions == "chat" and self.template is None:
            raise ConfigError(
                "completions='chat' needs a tokenizer with a chat template, and this one has none; "
                "use completions='plain'."
            )

    @property
    def chats_completions(self) -> bool:
        """Whether prompt/completion records become a chat turn."""
        return self.config.completions != "plain" and self.template is not None

    def require(self, record: Record) -> None:
        """Raise what concerns every record of its kind: a missing template, policy or end token."""
        if isinstance(record, ChatRecord):
            _ = self._chat_template
            if self.config.train == "completion":
                raise ConfigError(
                    f"{record.origin}: train='completion' is for prompt/completion records, and this "
                    "is a conversation; use train='last' or train='assistant'."
                )
        elif not self.chats_completions and self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end-of-sequence token, so a completion could not learn to stop; "
                "set tokenizer.eos_token."
            )

    def render(self, record: Record) -> Rendered:
        """Ids and weights of a record. Raises `DataError` that names it where no exact mask is found."""
        self.require(record)
        if isinstance(record, CompletionRecord) and not self.chats_completions:
            return self._plain(record)
        chat = record.as_chat() if isinstance(record, CompletionRecord) else record
        template = self._chat_template
        text = template.text(chat.messages, origin=chat.origin)
        if self.config.train == "all":
            ids = self._ids(text)
            return Rendered(tuple(ids), (1.0,) * len(ids), chat.origin)
        spans = template.spans(
            text, chat.messages, only_last=self.config.train == "last", origin=chat.origin
        )
        ids, weights = self._mask(text, spans, chat.origin)
        return Rendered(tuple(ids), tuple(weights), chat.origin)

    def prompt(self, messages: Sequence[Message] | str) -> list[int]:
        """The ids to answer: a conversation that ends with the user, or a plain text.

        Plain text is made a user turn exactly where prompts of prompt/completion records are.
        """
        if isinstance(messages, str):
            if not self.chats_completions:
                return [*self._opening(), *self._ids(messages)]
            messages = [Message("user", messages)]
        check_roles(tuple(messages), "prompt", answered=False)
        return self._ids(self._chat_template.text(messages, answer=True, origin="prompt"))

    @property
    def _chat_template(self) -> Template:
        if self.template is None:
            raise DataError(
                "these are chat messages, and the tokenizer has no chat template. Use the model's "
                "instruct variant, set tokenizer.chat_template, or give prompt/completion records."
            )
        return self.template

    def _plain(self, record: CompletionRecord) -> Rendered:
        text = record.prompt + record.completion
        first = 0 if self.config.train == "all" else len(record.prompt)
        ids, weights = self._mask(text, [Span(first, len(text), 1.0)], record.origin)
        opening = self._opening()
        end = self.tokenizer.eos_token_id
        return Rendered(
            (*opening, *ids, end), (*(0.0 for _ in opening), *weights, 1.0), record.origin
        )

    def _opening(self) -> list[int]:
        """The begin-of-sequence token, where this tokenizer adds one to plain text by itself."""
        begin = self.tokenizer.bos_token_id
        first = self.tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        return [begin] if begin is not None and first == [begin] else []

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _mask(self, text: str, spans: Sequence[Span], origin: str) -> tuple[list[int], list[float]]:
        """Ids of ``text``, and for each the weight of the span that it lies in (else 0)."""
        ids = self._ids(text)
        weights = [0.0] * len(ids)
        for span in spans:
            start, stop = (self._border(text, ids, place) for place in (span.start, span.stop))
            if start is None or stop is None:
                return self._mask_by_pieces(text, spans, ids, origin)
            weights[start:stop] = [span.weight] * (stop - start)
        return ids, weights

    def _border(self, text: str, ids: list[int], place: int) -> int | None:
        """How many tokens ``text[:place]`` has, if those are the first ones of ``ids``."""
        if place == len(text):
            return len(ids)
        prefix = self._ids(text[:place])
        return len(prefix) if ids[: len(prefix)] == prefix else None

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
                piece = self._ids(text[start:stop])
                ids += piece
                weights += [weight] * len(piece)
            place = span.stop
        tail = self._ids(text[place:])
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
