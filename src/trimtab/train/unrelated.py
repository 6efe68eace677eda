"""Forgetting in a run: an unrelated text measured before and after, noted as events."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.evals.forgetting import (
    LONGEST,
    Forgetting,
    forgetting,
    general_text,
    paragraphs,
    read_text,
)
from trimtab.train.events import Events, read_events
from trimtab.train.screen import Screen


class Unrelated:
    """Measures what the recipe's ``eval.forgetting`` names; ``data`` is that text, paragraph by paragraph.

    A model that is not causal predicts no next token: nothing is measured.

    Raises:
        DataError: a text file that cannot be read, or is empty.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        option: bool | str,
        adapter: str,
    ) -> None:
        self._engine, self._adapter = engine, adapter
        self._text = "general.txt" if option is True else Path(str(option)).name
        self.data: list[Datum] = []
        self.bare: Forgetting | None = None
        """The bare base, once it is measured."""
        if option is not False and engine.causal:
            text = general_text() if option is True else read_text(str(option))
            longest = min(engine.context(adapter) or LONGEST, LONGEST, engine.micro_tokens)
            self.data = paragraphs(text, tokenizer, longest=longest)

    @property
    def measures(self) -> bool:
        """Whether there is a text to measure."""
        return bool(self.data)

    def before(self, events: Events, screen: Screen, other: Unrelated | None = None) -> None:
        """The bare base, unless it was measured before the run was resumed, or by an ``other`` on the same text."""
        if self.measures and self._noted(events) is None:
            same = other is not None and other.data == self.data
            self._note(None, 0, events, screen, other.bare if other is not None and same else None)

    def after(self, step: int, events: Events, screen: Screen) -> None:
        """The adapter at the end of the run."""
        if self.measures:
            self._note(self._adapter, step, events, screen)

    def _note(
        self,
        adapter: str | None,
        step: int,
        events: Events,
        screen: Screen,
        known: Forgetting | None = None,
    ) -> None:
        found = known or forgetting(self._engine, self.data, adapter)
        if adapter is None:
            self.bare = found
        of = "base" if adapter is None else "adapter"
        fields: dict[str, Any] = {"step": step, "of": of, "text": self._text}
        before = self._noted(events)
        if adapter is not None and before is not None and before.weights == found.weights:
            fields["change"] = asdict(found.change(before))
        events.add("forgetting", {**fields, **found.fields()})
        screen.note(f"{of}: perplexity of an unrelated text {found.perplexity}", "cyan")

    def _noted(self, events: Events) -> Forgetting | None:
        """The base's measurement in the events so far."""
        for event in read_events(events.path):
            if event.get("event") == "forgetting" and event["of"] == "base":
                return Forgetting.of(event)
        return None
