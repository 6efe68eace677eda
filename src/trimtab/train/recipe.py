"""The recipe: everything that a run depends on, as one validated value. No torch here.

Defaults follow "LoRA Without Regret" (Thinking Machines 2025): all linear layers, ten times the learning
rate of full fine-tuning (each method brings its own), a constant schedule, moderate batches.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.optim.params import AdamParams
from trimtab.optim.schedule import ScheduleName

DEFAULT_METHOD = "lora"


class DataRecipe(Config):
    """What is learnt, and what it is measured on.

    ``held_out`` is a file of its own, or ``fraction`` of ``path`` is held out, chosen by a hash of each
    example: the choice is stable when rows are added, and equal examples fall on one side. ``train``,
    ``completions``: see `trimtab.data.RenderConfig`; ``too_long``, ``masked``, ``bad_rows``: see
    `trimtab.data.ExampleConfig`. ``max_tokens`` None is the model's context.
    """

    path: str
    held_out: str | None = None
    fraction: float = Field(default=0.0, ge=0, lt=1)
    train: Literal["assistant", "last", "completion", "all"] = "assistant"
    completions: Literal["auto", "chat", "plain"] = "auto"
    max_tokens: int | None = Field(default=None, ge=2)
    too_long: Literal["error", "drop", "left", "right"] = "error"
    masked: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.held_out is not None and self.fraction:
            raise ValueError("give held_out or fraction, not both")
        return self


class OptimRecipe(Config):
    """AdamW and its schedule. ``lr`` and ``weight_decay`` None are the method's defaults; ``warmup`` below 1
    is a fraction of all steps, else a number of steps."""

    lr: float | None = Field(default=None, gt=0)
    schedule: ScheduleName = "constant"
    warmup: float = Field(default=0.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)

    def params(self, lr: float) -> AdamParams:
        """What one step is told, once the method's defaults are filled in."""
        return AdamParams(
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay or 0.0,
            clip=self.clip,
        )


class BatchRecipe(Config):
    """A step is ``size`` examples, or as many as reach ``tokens``; it is computed in micro-batches of at most
    ``micro_tokens`` cells, which changes the memory it needs and not what it computes."""

    size: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    micro_tokens: int = Field(default=2048, ge=2)

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.size is not None and self.tokens is not None:
            raise ValueError("give size (examples) or tokens, not both")
        return self

    @property
    def examples(self) -> int:
        """Examples of a step that is not measured in tokens."""
        return 16 if self.size is None else self.size


class EvalRecipe(Config):
    """Measured on held-out data before and after, and ``every`` so many steps.

    ``metric``: ``loss`` only, or greedy answers too, compared by ``exact`` match or as a ``choice`` among the
    labels; ``limit`` bounds how many are asked. ``samples`` answers are shown; ``max_tokens`` None is the
    longest reference. ``forgetting`` measures an unrelated text before and after: the one that Trimtab brings
    (True), or a file of yours (its path).
    """

    every: int | None = Field(default=None, ge=1)
    metric: Literal["loss", "exact", "choice"] = "loss"
    samples: int = Field(default=4, ge=0)
    limit: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    forgetting: bool | str = True


class CheckpointRecipe(Config):
    """A checkpoint ``every`` so many steps (None: ten in a run); the last ``keep`` stay, and the best one by
    held-out loss."""

    every: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1)


class Recipe(Config):
    """A run. ``steps`` stops earlier or goes on longer than ``epochs``; ``out`` None makes a new folder below
    ``runs``. ``track`` names experiment trackers (`trimtab.train.trackers`)."""

    model: str
    data: DataRecipe
    method: str | dict[str, Any] = DEFAULT_METHOD
    name: str = "default"
    optim: OptimRecipe = OptimRecipe()
    batch: BatchRecipe = BatchRecipe()
    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    eval: EvalRecipe = EvalRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    dtype: Literal["bfloat16", "float32", "float16", "float64"] | None = None
    device: str | None = None
    seed: int = 0
    out: str | None = None
    track: tuple[str, ...] = ()


FREE: Any = {
    "out": True,
    "track": True,
    "eval": True,
    "checkpoint": True,
    "device": True,
    "model": True,
    "data": {"path": True, "held_out": True},
}
"""What may differ when a run is resumed: it changes nothing that is computed. The base and the data may have
moved; that they are the same is checked by their content."""


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the options that change what is computed, and differ."""
    left, right = (_flat(recipe.model_dump(exclude=FREE)) for recipe in (one, other))
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
