"""What of a record is trained, and how one that is no conversation becomes text."""

from __future__ import annotations

from typing import Literal

from trimtab.config import Config


class RenderConfig(Config):
    """What is trained, and how records that are no conversations become text.

    ``train``: ``assistant`` (every assistant turn), ``last`` (the last one), ``completion`` (for data
    of prompt/completion records only), ``all`` (every token). ``completions``: prompt/completion
    records as one ``chat`` turn by the template, as ``plain`` text, or ``auto`` (chat where the
    tokenizer has a template).

    ``instruction`` makes a question of a labelled text: it goes before the text, or holds ``{text}``
    (and ``{text_pair}``) where that shall stand. ``labels`` are the answers, in the order of labels that
    are numbers; others are errors. ``preference``: train on the ``chosen`` answer alone, or ``error``.
    """

    train: Literal["assistant", "last", "completion", "all"] = "assistant"
    completions: Literal["auto", "chat", "plain"] = "auto"
    instruction: str | None = None
    labels: tuple[str, ...] | None = None
    preference: Literal["error", "chosen"] = "error"
