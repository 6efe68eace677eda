"""A round of a sweep: its variants step together, and those that lose are stopped on the way."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.adapt.attach import detach
from trimtab.train import facts
from trimtab.train.interrupt import Interrupt
from trimtab.train.screen import Screen
from trimtab.train.stage import Computed, Stage
from trimtab.train.sweep.contestant import Contestant
from trimtab.train.sweep.halving import Rung
from trimtab.train.sweep.joined import Joined
from trimtab.train.sweep.record import Entry, Record
from trimtab.train.sweep.variants import label_of


class Round:
    """Trains its contestants until each is stopped, failed or finished.

    Args:
        entries: of all variants of the round, also of those that are over and no contestants.
        rungs: all decisions of the round, those that are made already among them.
        interrupt: someone's wish to stop.
    """

    def __init__(
        self,
        stage: Stage,
        contestants: Sequence[Contestant],
        entries: Sequence[Entry],
        rungs: Sequence[Rung],
        record: Record,
        interrupt: Interrupt,
    ) -> None:
        self.contestants = list(contestants)
        self._stage, self._entries, self._rungs = stage, entries, rungs
        self._record, self._interrupt = record, interrupt
        self._screen: Screen = stage.screen
        self._stopping = False
        micro_tokens = {one.course.recipe.batch.micro_tokens for one in contestants}
        self._joined = Joined(stage.engine, max(micro_tokens, default=1))

    def go(self) -> bool:
        """Train; whether it was stopped because someone asked to."""
        everyone = tuple(self.contestants)
        try:
            return self._go()
        except BaseException as error:
            for one in everyone:
                one.break_off(error)
            raise

    def _go(self) -> bool:
        for one in self.contestants:
            one.begin(lambda: self._stopping)
        longest = max((one.course.total for one in self.contestants), default=1)
        with self._screen.progress(max((c.step for c in self.contestants), default=0), longest):
            while True:
                self._settle()
                due = self._due()
                if not due:
                    return False
                self._stopping = self._interrupt.wanted
                self._step(due)
                if self._stopping:
                    for one in self.contestants:
                        one.leave()
                    return True

    # -- steps ---------------------------------------------------------------------------------------

    def _due(self) -> list[Contestant]:
        """Those that step next: of all that do not wait for a decision, those that are furthest behind."""
        waiting = [one for one in self.contestants if one.step < self._bound(one)]
        least = min((one.step for one in waiting), default=0)
        return [one for one in waiting if one.step == least]

    def _bound(self, one: Contestant) -> int:
        return bound(self._rungs, self._record.decided, one.course.total)

    def _step(self, due: Sequence[Contestant]) -> None:
        wanted = [one.wanted for one in due]
        found = self._joined.compute(wanted)
        for one in due:
            one.take(found[one.name])
        done = [value for value in found.values() if isinstance(value, Computed)]
        if done:
            tokens = sum(len(datum) for one in wanted for datum in one.members)
            rate = tokens / sum(value.seconds for value in done)
            loss = sum(value.loss.mean for value in done) / len(done)
            memory = facts.peak_memory(self._stage.base.model.device)
            self._screen.step(max(one.step for one in due), loss, rate, memory)

    # -- who goes on ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let go of those that are over, and decide what can be decided."""
        self._part()
        while self.contestants and self._record.decided < len(self._rungs) and not self._due():
            self._decide(self._rungs[self._record.decided])
            self._part()

    def _part(self) -> None:
        """Finish those that came to their end or to an error. The others are saved, so that none has to be computed
        again beside those that are gone."""
        over = [one for one in self.contestants if one.over]
        if not over:
            return
        self.contestants = [one for one in self.contestants if not one.over]
        for one in self.contestants:
            one.save()
        for one in over:
            one.finish()
            self._gone([one])
            self._say(one)

    def _say(self, one: Contestant) -> None:
        entry, label = one.entry, one.variant.label
        if entry.status == "failed":
            self._screen.note(f"{label}: failed: {entry.why}", "red")
        else:
            self._screen.note(
                f"{label}: finished after step {entry.step}, held-out loss {entry.loss:.4f}", "cyan"
            )

    def _decide(self, rung: Rung) -> None:
        """Judge all, and stop those that are not among the best."""
        for one in self.contestants:
            one.judge()
        running = {one.entry.number for one in self.contestants if not one.over}
        ranked = sorted(
            (e for e in self._entries if e.status == "finished" or e.number in running),
            key=lambda entry: (entry.loss, entry.number),
        )
        places = {entry.number: place for place, entry in enumerate(ranked, 1)}
        lost = [c for c in self.contestants if places.get(c.entry.number, 0) > rung.keep]
        self.contestants = [one for one in self.contestants if one not in lost]
        for one in lost:
            one.stop(places[one.entry.number], len(ranked))
        self._record.decided += 1
        self._gone(lost)
        if ranked:
            best = ranked[0]
            self._screen.note(
                f"{len(ranked) - len(lost)} of {len(ranked)} go on; best so far: {label_of(best.choice)}, held-out "
                f"loss {best.loss:.4f}",
                "cyan",
            )

    def _gone(self, gone: Sequence[Contestant]) -> None:
        """Note what became of them, and give their memory back."""
        self._record.write()
        for one in gone:
            detach(self._stage.base.model, one.name)
            self._stage.engine.forget(one.name)


def bound(rungs: Sequence[Rung], decided: int, total: int) -> int:
    """The step at which a variant of ``total`` steps waits for the next decision, or ends."""
    return rungs[decided].step(total) if decided < len(rungs) else total
