"""``trimtab chat``: talk with a base, and switch adapters inside the conversation.

Answers go to standard output, everything else to standard error: a pipe gets the answers alone.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from trimtab.cli.bases import AVERAGE_BITS, EXEMPT, STORAGE, open_base
from trimtab.errors import ConfigError, TrimtabError, UnknownNameError, suggest

if TYPE_CHECKING:
    from trimtab.cli.conversation import Conversation

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What a model says is not to command the terminal."""


def chat(
    model: str = typer.Option(..., "--model", "-m", help="Folder, hub id or .gguf of the base."),
    adapters: list[str] = typer.Option(
        [],
        "--adapter",
        "-a",
        help="Adapter folder, or a run's (may be repeated); the first answers.",
    ),
    system: str = typer.Option(None, "--system", help="System text."),
    max_tokens: int = typer.Option(512, "--max-tokens", min=1, help="Most tokens of an answer."),
    temperature: float = typer.Option(0.7, "--temperature", min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(
        0.95, "--top-p", help="Keep the likeliest tokens up to this probability."
    ),
    seed: int = typer.Option(None, "--seed", help="Makes a conversation repeat."),
    storage: str = STORAGE,
    exempt: list[str] = EXEMPT,
    average_bits: float = AVERAGE_BITS,
) -> None:
    """Chat with a model; /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    from trimtab.cli.adapters import attach_adapters, read_adapters
    from trimtab.cli.conversation import Conversation
    from trimtab.data import RenderConfig, Renderer
    from trimtab.engine import Engine, SamplingParams, keep_memory

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    saved = read_adapters(adapters)
    base = open_base(model, saved.values(), storage, exempt, average_bits)
    if base.model.device.type == "cpu":
        keep_memory()
    names = attach_adapters(base, saved)
    talk = Conversation(
        Engine(base),
        Renderer(base.tokenizer, RenderConfig()),
        params,
        adapter=names[0] if names else None,
        system=system,
    )
    Chat(talk, names).run(Path(model).name if Path(model).exists() else model)


class Chat:
    """Reads lines, and answers them or does what they command."""

    def __init__(self, talk: Conversation, adapters: list[str]) -> None:
        self._talk = talk
        self._adapters = adapters
        self._last: str | None = None
        self._leaving = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "adapter": ("NAME|none", "answer by this adapter, or by the base", self._adapter),
            "adapters": ("", "list the adapters", self._list),
            "system": ("TEXT", "set the system text; empty removes it", self._system),
            "reset": ("", "forget the conversation", self._reset),
            "retry": ("", "answer the last question again", self._retry),
            "temperature": ("X", "0 is greedy", self._temperature),
            "max": ("N", "most tokens of an answer", self._max),
            "save": ("FILE", "append the conversation to a JSONL file, as a record", self._save),
            "help": ("", "this list", self._help),
            "quit": ("", "leave", self._quit),
        }

    def run(self, name: str) -> None:
        """Until /quit or the end of the input."""
        note(f"{name}; {self._who()} answers. /help lists the commands, Ctrl-D leaves.")
        if not self._talk.chats:
            note("This model has no chat template: it continues your text, and you its.")
            if self._talk.system is not None:
                note("Without a template there is no place for the system text; it is not used.")
        while not self._leaving:
            line = read(f"[{self._talk.adapter or 'base'}] > ")
            if line is None:
                break
            try:
                self._line(line)
            except TrimtabError as error:
                note(str(error))

    def _line(self, line: str) -> None:
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/") if line.startswith("//") else line)
            return
        word, _, argument = line[1:].partition(" ")
        if word not in self._commands:
            hint = suggest(word, self._commands) or " /help lists them."
            raise UnknownNameError(
                f"unknown command /{word}.{hint} Two slashes begin a message with one."
            )
        self._commands[word][2](argument.strip())

    def _answer(self, text: str) -> None:
        """Stream one answer. Ctrl-C ends it, and what was said until then stays."""
        talk, self._last = self._talk, text
        stream, dropped = talk.ask(text)
        if dropped:
            note(f"The context is full: the oldest {dropped} messages are forgotten.")
        said: list[str] = []
        try:
            with stoppable() as stopped, stream:
                for piece in stream:
                    said.append(piece)
                    say(piece)
                    if stopped():
                        break
                stopping = stopped()
        except BaseException:
            talk.take_back()
            raise
        say("\n")
        answer = "".join(said)
        if talk.chats:
            answer = answer.strip()
        if not answer.strip():
            talk.take_back()
            note("No answer; the question is taken back. /retry asks it again.")
            return
        talk.keep(answer)
        if stopping:
            note("Stopped; the conversation goes on from here.")
        elif stream.completion.finish == "length":
            note(f"Cut after {len(stream.completion.tokens)} tokens; /max N allows more.")

    # -- commands --------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> None:
        if name in ("none", "base"):
            self._talk.adapter = None
        elif name in self._adapters:
            self._talk.adapter = name
        elif name:
            known = ", ".join([*self._adapters, "none"])
            raise UnknownNameError(
                f"no adapter {name!r}.{suggest(name, self._adapters) or f' There are: {known}.'}"
            )
        note(f"{self._who()} answers.")

    def _list(self, _: str) -> None:
        for name in (*self._adapters, None):
            mark = "*" if name == self._talk.adapter else " "
            note(f"{mark} {name or 'none (the base)'}")

    def _system(self, text: str) -> None:
        if not self._talk.chats:
            raise ConfigError("without a chat template there is no place for a system text.")
        self._talk.system = text or None
        note("The system text is set." if text else "There is no system text.")

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._last = None
        note("The conversation is forgotten.")

    def _retry(self, _: str) -> None:
        question = self._last
        if question is None:
            raise ConfigError("there is no question to answer again.")
        if self._talk.history and self._talk.history[-2].content == question:
            self._talk.take_back()
        self._answer(question)

    def _temperature(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"/temperature takes a number, found {text!r}.") from None
        self._talk.params = self._talk.params.replace(temperature=value)
        note(f"temperature {value:g}")

    def _max(self, text: str) -> None:
        try:
            count = int(text)
        except ValueError:
            raise ConfigError(f"/max takes a whole number, found {text!r}.") from None
        self._talk.params = self._talk.params.replace(max_tokens=count)
        note(f"at most {count} tokens")

    def _save(self, file: str) -> None:
        if not file:
            raise ConfigError("/save takes a file name.")
        path = Path(file).expanduser()
        note(f"Saved as record {self._talk.save(path)} of {path}.")

    def _help(self, _: str) -> None:
        for name, (argument, what, _run) in self._commands.items():
            note(f"  {f'/{name} {argument}':20} {what}")

    def _quit(self, _: str) -> None:
        self._leaving = True

    def _who(self) -> str:
        return "the base" if self._talk.adapter is None else f"adapter {self._talk.adapter!r}"


# -- the terminal ------------------------------------------------------------------------------------


def read(prompt: str) -> str | None:
    """The next line, or None at the end. A terminal gets a prompt and can edit the line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        with suppress(ImportError):  # where there is one, input() edits lines and remembers them
            import readline  # noqa: F401
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /quit leaves.")


def say(piece: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(piece.translate(CONTROLS) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line that is not part of an answer."""
    typer.secho(text, err=True, dim=True)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is a wish that the yielded function tells of; a second one leaves at once.

    The wish waits for the token in progress: an exception in the middle of a forward would leave the model
    with half of its state.
    """
    wanted = False

    def wish(number: int, frame: FrameType | None) -> None:
        nonlocal wanted
        if wanted:
            raise KeyboardInterrupt
        wanted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: wanted
        return
    before = signal.signal(signal.SIGINT, wish)
    try:
        yield lambda: wanted
    finally:
        signal.signal(signal.SIGINT, before)
