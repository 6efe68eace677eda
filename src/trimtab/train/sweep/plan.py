"""What is said of a round of a sweep before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.models.load import Base
from trimtab.train.page import sized
from trimtab.train.setup import Rows
from trimtab.train.sweep.halving import Rung, budget
from trimtab.train.sweep.outset import Ready, training_bytes
from trimtab.train.sweep.record import Entry
from trimtab.train.sweep.variants import label_of

MOST_SHOWN = 12


def plan_rows(
    base: Base, ready: Sequence[Ready], entries: Sequence[Entry], decisions: Sequence[Rung]
) -> Rows:
    """Facts by name; ``ready`` are those of the variants that are still to be trained."""
    totals = sorted({entry.total for entry in entries})
    longest = totals[-1]
    each = f"{longest}" if len(totals) == 1 else f"{totals[0]} to {longest}"
    halvings = [f"{rung.keep} go on after step {rung.step(longest)}" for rung in decisions]
    labels = [label_of(entry.choice) for entry in entries[:MOST_SHOWN]]
    more = "; …" if len(entries) > MOST_SHOWN else ""
    trained = sum(one.adapter.count for one in ready)
    model = f"{base.name}, {str(base.model.dtype).removeprefix('torch.')}, on {base.model.device}"
    return [
        ("model", model),
        *(("data", note) for note in dict.fromkeys(n for one in ready for n in one.sources.notes)),
        ("variants", f"{len(entries)}: {'; '.join(labels)}{more}"),
        ("steps", "; ".join([f"{each} of each variant", *halvings])),
        ("in all", f"at most {budget(len(entries), decisions, longest):,} steps"),
        (
            "memory",
            f"{trained:,} trained parameters of {len(ready)} adapters take {sized(training_bytes(ready))} in "
            "training, beside one base",
        ),
    ]
