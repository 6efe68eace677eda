"""Where a run stands: what a checkpoint stores beside the adapter's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from trimtab.data import Cursor
from trimtab.train.recipe import EvalRecipe


@dataclass
class Progress:
    """``step`` steps are done, with ``tokens`` tokens; ``cursor`` is that of the last one. ``best`` is (step, loss)
    of the lowest held-out loss, ``stale`` how many measurements came since; ``over`` tells that the run stopped
    early."""

    step: int = 0
    cursor: Cursor | None = None
    tokens: int = 0
    best: tuple[int, float] | None = None
    stale: int = 0
    over: bool = False

    def fields(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """What `fields` gave."""
        best = fields["best"]
        return cls(**{**fields, "best": None if best is None else (best[0], best[1])})

    def measured(self, loss: float, recipe: EvalRecipe) -> None:
        """Take a held-out loss into account: is it the best so far, and is it time to stop?"""
        if self.best is None or loss < self.best[1] - recipe.min_gain:
            self.best, self.stale = (self.step, loss), 0
        else:
            self.stale += 1
        self.over = recipe.patience is not None and self.stale >= recipe.patience
