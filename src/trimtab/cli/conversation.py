"""A conversation with a model and adapters on it: its history, who answers, and how. No terminal here.

With a chat template the history is messages; without one it is a text that the user and the model continue in
turns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError, StorageError

if TYPE_CHECKING:
    from trimtab.data import Message, Renderer
    from trimtab.engine import Engine, SamplingParams, Stream


@dataclass
class Conversation:
    """``history`` alternates between user and assistant. ``adapter`` None is the bare base."""

    engine: Engine
    renderer: Renderer
    params: SamplingParams
    adapter: str | None = None
    system: str | None = None
    history: list[Message] = field(default_factory=list)
    answered: int = 0

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self.renderer.template is not None

    def ask(self, text: str) -> tuple[Stream, int]:
        """The answer to ``text`` as it is made, and how many old messages had to be dropped for it to fit.

        The history has the question from now on; `keep` or `take_back` must follow.

        Raises:
            DataError: the question alone does not fit into the model's context, or the template refuses it; the
                history is as it was.
        """
        from trimtab.data import Message

        before = list(self.history)
        self.history.append(Message("user", text))
        try:
            prompt, dropped = self._fitting()
            room = self._room(prompt)
            seed = self.params.seed
            params = self.params.replace(
                max_tokens=self.params.max_tokens
                if room is None
                else min(self.params.max_tokens, room),
                seed=None if seed is None else seed + self.answered,
            )
            stream = self.engine.stream(prompt, params, self.adapter)
        except Exception:
            self.history = before
            raise
        self.answered += 1
        return stream, dropped

    def keep(self, answer: str) -> None:
        """The answer becomes part of the history."""
        from trimtab.data import Message

        self.history.append(Message("assistant", answer))

    def take_back(self) -> str | None:
        """Remove the last question, and its answer if it has one; returns the question."""
        while self.history:
            message = self.history.pop()
            if message.role == "user":
                return message.content
        return None

    def reset(self) -> None:
        """Forget the history; adapter, system text and parameters stay."""
        self.history.clear()

    def record(self) -> dict[str, Any]:
        """The conversation as a record that trains.

        Raises:
            DataError: nothing has been answered yet.
        """
        if not self.history:
            raise DataError("there is nothing to save yet: no question has been answered.")
        if not self.chats:
            *rest, last = [message.content for message in self.history]
            return {"prompt": _joined(rest), "completion": last}
        turns = [{"role": one.role, "content": one.content} for one in self._messages()]
        return {"messages": turns}

    def save(self, path: Path) -> int:
        """Append the record to a JSONL file; returns how many lines it has then.

        Raises:
            DataError: nothing to save; `StorageError`: the file cannot be written.
        """
        line = json.dumps(self.record(), ensure_ascii=False)
        try:
            old = path.read_bytes() if path.exists() else b""
            gap = "\n" if old and not old.endswith(b"\n") else ""
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{gap}{line}\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}.") from error
        return sum(1 for row in old.splitlines() if row.strip()) + 1

    # -- the prompt ------------------------------------------------------------------------------------

    def _messages(self) -> list[Message]:
        from trimtab.data import Message

        opening = [] if self.system is None else [Message("system", self.system)]
        return [*opening, *self.history]

    def _prompt(self) -> list[int]:
        if self.chats:
            return self.renderer.prompt(self._messages())
        return self.renderer.prompt(_joined([message.content for message in self.history]))

    def _fitting(self) -> tuple[list[int], int]:
        """The prompt with room for an answer, and how many of the oldest messages it cost."""
        dropped = 0
        while True:
            prompt = self._prompt()
            room = self._room(prompt)
            if room is None or room >= self.params.max_tokens or len(self.history) == 1:
                break
            del self.history[:2]
            dropped += 2
        if room is not None and room < 1:
            raise DataError(
                f"this message has {len(prompt)} tokens, and the model's context is "
                f"{self.engine.context(self.adapter)}; shorten it."
            )
        return prompt, dropped

    def _room(self, prompt: list[int]) -> int | None:
        """Tokens that are left for an answer; None without a limit."""
        limit = self.engine.context(self.adapter)
        return None if limit is None else limit - len(prompt)


def _joined(texts: list[str]) -> str:
    """What was continued in turns, as one text: an answer follows at once, a new line of the user on a new line."""
    whole = ""
    for place, text in enumerate(texts):
        whole += f"\n{text}" if place and place % 2 == 0 else text
    return whole
