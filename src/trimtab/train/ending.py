"""How a course ends: the last measurement, and the state that becomes the adapter."""

from __future__ import annotations

from trimtab.adapt.export import exported
from trimtab.train import facts
from trimtab.train.course import Course
from trimtab.train.measure import EACH, Measured
from trimtab.train.setup import provenance

ADAPTER, REPORT = "adapter", "report.html"


def finish(course: Course) -> Measured | None:
    """The last measurement and checkpoint, and the adapter in its folder; what was measured of it."""
    progress, recipe = course.progress, course.recipe
    final, name = recipe.checkpoint.final, course.adapter.name
    after = None
    if course.measure is not None and final == "last":
        after = course.measured(full=True)
        course.note(after)
    elif course.measure is not None and not progress.over:
        course.note(course.measured(full=False))
    course.save()
    step = progress.step
    if final == "best" and progress.best is not None:
        step = progress.best[0]
        if step != progress.step:
            course.engine.load(course.checkpoints.path(step), name)
            course.screen.note(f"the adapter is that of step {step}, the best one.")
        after = course.measured(full=True)
        course.events.add("eval", {"step": step, "of": "adapter", **after.fields()})
    course.engine.take_average(name)
    if after is not None:
        course.screen.measured("adapter", after)
        course.screen.samples(course.bare, after)
    course.unrelated.after(step, course.events, course.screen)
    _keep(course, step, after)
    return after


def _keep(course: Course, step: int, after: Measured | None) -> None:
    """Write the adapter, which is that of ``step``, and what is known of it."""
    tokens = course.progress.tokens
    metrics = {} if after is None else after.fields()
    course.adapter.origin.provenance = {
        **provenance(course.recipe, course.sources),
        "step": step,
        "tokens": tokens,
        "metrics": {name: value for name, value in metrics.items() if name not in EACH},
    }
    folder = course.folder / ADAPTER
    exported(course.adapter).save(folder, bits=course.recipe.checkpoint.bits)
    course.events.add(
        "end",
        {
            "step": course.progress.step,
            "adapter_step": step,
            "tokens": tokens,
            "peak_bytes": facts.peak_memory(course.base.model.device),
        },
    )
    course.screen.note(f"adapter: {folder}\nreport: {course.folder / REPORT}", "green")
