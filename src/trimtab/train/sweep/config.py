"""How a sweep chooses its variants, and when it stops those that lose. No torch here."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from trimtab.config import Config


class SweepConfig(Config):
    """How a sweep goes about it."""

    sampler: str = "grid"
    """Who chooses: grid (every combination), random, optuna."""
    count: int | None = Field(default=None, ge=2)
    """How many variants; a grid has as many as it has."""
    seed: int = 0
    """Of what is drawn."""
    eta: int = Field(default=2, ge=1)
    """One of so many goes on after each decision; 1 trains all variants to the end."""
    first: int = Field(default=1, ge=1)
    """Fewest steps of a variant before the first decision."""
    together: int | None = Field(default=None, ge=1)
    """Train so many at once, one round after the other; empty is all."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.sampler == "grid" and self.count is not None:
            raise ValueError("a grid is every combination; --random draws so many")
        if self.sampler != "grid" and self.count is None:
            raise ValueError(f"say how many variants the sampler {self.sampler} draws: --random N")
        return self
