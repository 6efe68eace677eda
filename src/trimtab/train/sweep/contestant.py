"""A variant in training: its course, the step that it waits for, and how it stands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from trimtab.data import Datum
from trimtab.errors import NonFiniteLossError, StorageError
from trimtab.train.course import Course
from trimtab.train.ending import finish
from trimtab.train.report import write_report
from trimtab.train.stage import Computed
from trimtab.train.sweep.joined import Wanted
from trimtab.train.sweep.record import Entry
from trimtab.train.sweep.variants import Variant


class Contestant:
    """``entry`` is what the sweep's record says of it. Its course is open, and closed when it is over."""

    def __init__(self, variant: Variant, course: Course, entry: Entry) -> None:
        self.variant, self.course, self.entry = variant, course, entry
        self.error: NonFiniteLossError | None = None
        self.closed = False
        self._members: list[Datum] | None = None

    @property
    def name(self) -> str:
        """Of its adapter."""
        return self.course.adapter.name

    @property
    def step(self) -> int:
        return self.course.progress.step

    @property
    def over(self) -> bool:
        """Whether it takes no more steps: it came to its end, or to an error."""
        return self._members is None

    @property
    def wanted(self) -> Wanted:
        """Its next step."""
        assert self._members is not None
        return Wanted(self.name, self._members, self.course.recipe.loss)

    def begin(self, asked: Callable[[], bool]) -> None:
        """Go to its next step; it stops after one once it is ``asked`` to."""
        self._steps = self.course.steps(asked)
        self._advance(lambda: next(self._steps))

    def take(self, computed: Computed | NonFiniteLossError) -> None:
        """Take the step that it waits for, with what was computed for it."""
        if isinstance(computed, NonFiniteLossError):
            self.error, self._members = computed, None
        else:
            self._advance(lambda: self._steps.send(computed))

    def _advance(self, go: Callable[[], list[Datum]]) -> None:
        self._members = None
        try:
            self._members = go()
        except StopIteration:
            return
        except NonFiniteLossError as error:
            self.error = error

    # -- how it stands -------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self.step and self.course.checkpoints.last() != self.step:
            self.course.save()

    def judge(self) -> None:
        """Measure its held-out loss, which counts for the sweep and not for its own early stopping; and save it."""
        course = self.course
        if self.entry.step != self.step or self.entry.loss is None:
            try:
                measured = course.latest_at(self.step) or course.measured(full=False)
            except NonFiniteLossError as error:
                self.error, self._members = error, None
                return
            if course.latest_at(self.step) is None:
                course.events.add("eval", {"step": self.step, "of": "adapter", **measured.fields()})
            self.entry.step, self.entry.loss = self.step, measured.held_out.loss.value
        self.save()

    # -- how it ends ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Measure it to the end and keep its adapter; or note the error that it came to."""
        if self.error is None:
            try:
                after = finish(self.course)
            except NonFiniteLossError as error:
                self.error = error
        if self.error is not None:
            self._fail(self.error)
            return
        assert after is not None  # a sweep has held-out data
        self.entry.status = "finished"
        self.entry.step, self.entry.loss = self.step, after.held_out.loss.value
        self._close()

    def stop(self, place: int, of: int) -> None:
        """Stop it where it came in at that place."""
        self.course.events.add(
            "halved", {"step": self.step, "loss": self.entry.loss, "place": place, "of": of}
        )
        self.entry.status = "stopped"
        self.entry.why = f"place {place} of {of} after step {self.step}"
        self._close()

    def leave(self) -> None:
        """Let go of it as it is; the sweep goes on another time."""
        if not self.over:
            self.course.interrupted()
        self._close()

    def break_off(self, error: BaseException) -> None:
        """Note what ended the sweep, unless it was over before."""
        if not self.closed:
            self.course.failed(error)
            self.course.close()

    def _fail(self, error: NonFiniteLossError) -> None:
        self.course.failed(error)
        self.entry.status, self.entry.step, self.entry.loss = "failed", self.step, None
        self.entry.why = str(error)
        self._close()

    def _close(self) -> None:
        self.closed = True
        self.course.close()
        with suppress(StorageError):
            write_report(self.course.folder)
