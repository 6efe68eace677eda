"""What a run shows on the terminal: the plan, its progress, and the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trimtab.train.measure import Measured
from trimtab.train.page import sized
from trimtab.train.profile import Profile

READ_STEP = 100


class Screen:
    """Prints to one console; a quiet console prints nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._total = 1
        self._said = 0
        self.unit = "token"
        """What is right or wrong: a token, or a text that is classified."""

    def plan(self, rows: Sequence[tuple[str, str]], previews: Sequence[Text]) -> None:
        """The facts of a run before it starts, and a few examples with trained tokens marked."""
        self._facts(rows)
        for preview in previews:
            self.console.print()
            self.console.print(preview)
        if previews:
            self.console.print()

    def _facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what is to be said of them."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        self.console.print(table)

    def note(self, text: str, style: str = "") -> None:
        """One line."""
        self.console.print(Text(text, style=style))

    def measured(self, title: str, measured: Measured) -> None:
        """One measurement, as one line."""
        parts = [
            f"held-out loss {measured.held_out.loss}",
            f"{self.unit} accuracy {measured.held_out.accuracy}",
        ]
        answers = measured.answers
        if answers is not None:
            parts.append(
                f"answers right {answers.interval}, n = {answers.interval.count}, "
                f"majority class {answers.majority:.4g}"
            )
        shown = () if answers is None else ("choice", "exact")
        parts += [
            f"{name} {value}" for name, value in measured.metrics.items() if name not in shown
        ]
        self.note(f"{title}: " + "; ".join(parts), "cyan")

    def samples(self, before: Measured | None, after: Measured) -> None:
        """Answers before and after, side by side."""
        if not after.samples:
            return
        table = Table(title="Answers", show_lines=True)
        for name in ("prompt (its end)", "reference", "before", "after"):
            table.add_column(name, overflow="fold")
        old = before.samples if before is not None else ()
        for number, sample in enumerate(after.samples):
            first = old[number].answer if number < len(old) else ""
            tail = sample.prompt[-160:]
            table.add_row(
                Text(tail),
                Text(sample.reference.strip()),
                Text(first.strip()),
                Text(sample.answer.strip()),
            )
        self.console.print(table)

    def profile(self, found: Profile | None) -> None:
        """Where time and memory went, as a table and a few sentences."""
        if found is None:
            self.note("no step was left to profile.", "yellow")
            return
        table = Table(title=found.title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("room", style="bold")
        for name in ("seconds", "share", "of it backward", "kept for backward"):
            table.add_column(name, justify="right")
        for name, room in found.rows:
            share = f"{room.seconds / found.seconds:.1%}"
            kept = sized(room.kept) if room.kept else "–"
            sizes = (f"{room.seconds:.4f}", share, f"{room.backward:.4f}", kept)
            table.add_row(name, *sizes)
        self.console.print()
        self.console.print(table)
        self.console.print()
        self._facts(found.sentences)

    @contextmanager
    def reading(self) -> Iterator[Callable[[int, int | None], None]]:
        """Inside the ``with``, a function that is told (rows read, rows in all or None)."""
        with self._bar_of("reading", "") as bar:
            task = bar.add_task("reading", total=None, facts="", visible=False)

            def told(done: int, total: int | None) -> None:
                if done % READ_STEP == 0:
                    bar.update(task, completed=done, total=total, visible=True)

            yield told

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """A bar of steps, inside the ``with``."""
        bar = self._bar_of("training", "left")
        self._bar, self._total, self._said = bar, total, done
        task = bar.add_task("training", total=total, completed=done, facts="")
        try:
            with bar:
                self._task = task
                yield
        finally:
            self._bar = None

    def _bar_of(self, name: str, after: str) -> Progress:
        return Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            TextColumn(after),
            console=self.console,
            disable=not self.console.is_terminal or self.console.quiet,
        )

    def step(self, step: int, loss: float, rate: float, memory: int) -> None:
        """Move the bar; without a terminal, print a line about ten times in a run. ``rate`` is in tokens/s,
        ``memory`` the peak so far in bytes."""
        facts = f"loss {loss:.4f}  {rate:,.0f} tokens/s  {memory / 2**30:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        if not self.console.is_terminal and (
            step - self._said >= self._total / 10 or step == self._total
        ):
            self._said = step
            self.note(f"step {step} of {self._total}: {facts}")
