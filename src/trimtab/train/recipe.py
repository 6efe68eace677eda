"""The recipe: everything that a run depends on, as one validated value. No torch here.

Defaults follow "LoRA Without Regret" (Thinking Machines 2025): all linear layers, ten times the learning
rate of full fine-tuning (each method brings its own), a constant schedule, moderate batches.

The text below each option is its documentation: `trimtab recipe init` writes it as a comment, and the JSON
Schema holds it for editors.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trimtab.config import Config
from trimtab.models.storage import BLOCKS, check_storage
from trimtab.optim.params import AdamParams, CrossEntropy, Memory
from trimtab.optim.schedule import ScheduleName, learning_rate, part_of

DEFAULT_METHOD = "lora"


class SourceRecipe(Config):
    """One source of examples, and what is made of its rows."""

    path: str
    """File (JSONL, JSON, CSV, TSV, Parquet, text), a folder of such files, or the id of a data set on the hub."""
    split: str | None = None
    """Of a data set: train, validation, test."""
    subset: str | None = None
    """Of a data set that has several configurations: which."""
    columns: dict[str, str] | None = None
    """Our names to the source's, {prompt: question, completion: answer}; only these columns are then read."""
    ignore: tuple[str, ...] = ()
    """Columns that are left out, such as ids and other remarks."""
    map: str | None = None
    """A function of yours that takes a row and gives a row, rows or None: package.module:name or file.py:name."""
    filter: str | None = None
    """A function of yours that takes a row and says whether it stays."""
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch shows each example: 2 is twice, 0.5 every other one."""


class DataRecipe(SourceRecipe):
    """What is learnt, and what it is measured on."""

    mix: tuple[SourceRecipe, ...] = ()
    """Further sources, mixed in by their weights."""
    held_out: str | SourceRecipe | None = None
    """Examples to measure on, never trained on: a file, or a source with options of its own."""
    fraction: float = Field(default=0.0, ge=0, lt=1)
    """Hold out this share of the examples instead, chosen by a hash of each: rows that are added change nothing."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: train on each text once, and on none that is held out (compared without case and white space)."""
    train: Literal["assistant", "last", "completion", "all"] = "assistant"
    """What is learnt: every assistant turn, the last one, the completion (of prompt/completion rows), or all tokens."""
    completions: Literal["auto", "chat", "plain"] = "auto"
    """Prompts and completions as chat turns, as plain text, or as chat where the model has a template."""
    instruction: str | None = None
    """For labelled text: what the model is asked, before the text or around {text}."""
    labels: tuple[str, ...] | None = None
    """For labelled text: the names of integer labels, and the only labels allowed. A classification head has those
    that occur in the data, unless they are named here."""
    preference: Literal["error", "chosen"] = "error"
    """Preference pairs: refuse them, or learn the chosen answer."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest example; empty is the model's context."""
    too_long: Literal["error", "drop", "left", "right", "split"] = "error"
    """Longer examples: stop, drop them, cut their left or right end, or split plain text into pieces; counted."""
    masked: Literal["error", "drop"] = "error"
    """Examples without a token to learn."""
    bad_rows: Literal["error", "drop"] = "error"
    """Rows that cannot be read."""
    stream: bool = False
    """Read and tokenise while training, in constant memory, instead of once before; needs steps."""

    @model_validator(mode="after")
    def _sources_agree(self) -> Self:
        if self.held_out is not None and self.fraction:
            raise ValueError("give held_out or fraction, not both")
        if self.stream:
            wrong = [
                name
                for name, on in (
                    ("mix", bool(self.mix)),
                    ("fraction", bool(self.fraction)),
                    ("duplicates: drop", self.duplicates == "drop"),
                    ("weight", self.weight != 1),
                )
                if on
            ]
            if wrong:
                raise ValueError(
                    f"a stream is read once, in its order, and knows nothing of {', '.join(wrong)}; "
                    "leave stream out, or these"
                )
        return self


class OptimRecipe(Config):
    """AdamW and its schedule."""

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; empty is the method's default."""
    schedule: ScheduleName = "constant"
    """constant, linear, cosine, or wsd (warm up, stay, decay over the last part)."""
    warmup: float = Field(default=0.0, ge=0)
    """Steps of warm-up; below 1, a fraction of all steps."""
    decay: float = Field(default=0.2, gt=0)
    """Of wsd: steps of the decay; below 1, a fraction of all steps."""
    floor: float = Field(default=0.0, ge=0, lt=1)
    """What linear, cosine and wsd end at, as a share of the peak."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Of matrices; vectors (biases, scales) never decay. Empty is the method's default."""
    clip: float | None = Field(default=1.0, gt=0)
    """Bound of the gradient's norm; null is none."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Measure and save an exponential moving average of the adapter with this decay, such as 0.99."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's ε."""

    def rate(self, step: int, total: int) -> float:
        """The learning rate of ``step`` (from 0) of ``total``, once the method's default is filled in."""
        return learning_rate(
            self.schedule,
            self.lr or 0.0,
            step,
            total,
            warmup=part_of(self.warmup, total),
            decay=part_of(self.decay, total),
            floor=self.floor,
        )

    def params(self, lr: float, total: int | None = None) -> AdamParams:
        """What one step of ``total`` is told, once the method's defaults are filled in."""
        return AdamParams(
            lr=lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay or 0.0,
            clip=self.clip,
            ema=self.ema,
            total=total,
        )


class BatchRecipe(Config):
    """How much data a step sees. It is computed in micro-batches whose gradients add up, which changes the memory
    it needs and not the result."""

    size: int | None = Field(default=None, ge=1)
    """Examples of a step (16, unless tokens are given)."""
    tokens: int | None = Field(default=None, ge=1)
    """Instead: most tokens of a step, filled by best fit."""
    micro_tokens: int = Field(default=2048, ge=2)
    """Most tokens that are computed at once: what bounds the memory."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.size is not None and self.tokens is not None:
            raise ValueError("give size (examples) or tokens, not both")
        return self

    @property
    def examples(self) -> int | None:
        """Examples of a step that is not measured in tokens."""
        return None if self.tokens is not None else self.size or 16


MetricName = Literal["loss", "exact", "choice", "f1", "token_f1", "json", "rouge", "bleu", "chrf"]


class EvalRecipe(Config):
    """Measurements on held-out data, before the first step and after the last."""

    every: int | None = Field(default=None, ge=1)
    """Measure in the middle of the run too, every so many steps."""
    midway: Literal["loss", "answers"] = "loss"
    """What is measured in the middle: loss and token accuracy, or the metric and sample answers too."""
    patience: int | None = Field(default=None, ge=1)
    """Stop early after so many measurements without a better held-out loss."""
    min_gain: float = Field(default=0.0, ge=0)
    """How much lower a held-out loss must be to count as better."""
    metric: MetricName | tuple[MetricName, ...] = "loss"
    """Beside the loss, ask for greedy answers and compare them, by one metric or several: exact match, choice among
    the labels or f1 over them, token_f1, json, rouge, bleu, chrf."""
    limit: int | None = Field(default=None, ge=1)
    """Ask at most so many."""
    samples: int = Field(default=4, ge=0)
    """Answers that are shown."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; empty is the longest reference."""
    forgetting: bool | str = True
    """Measure an unrelated text before and after: the one that Trimtab brings, or a text file of yours."""

    @property
    def asks(self) -> bool:
        """Whether answers are compared with references."""
        return bool(self.metrics)

    @model_validator(mode="after")
    def _patience_needs_measurements(self) -> Self:
        if self.patience is not None and self.every is None:
            raise ValueError(
                "patience counts measurements in the middle of a run; set every as well"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that compare answers, each once; the loss is always measured."""
        named = (self.metric,) if isinstance(self.metric, str) else self.metric
        return tuple(dict.fromkeys(name for name in named if name != "loss"))


class CheckpointRecipe(Config):
    """Whole states to resume from."""

    every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; empty is ten in a run."""
    keep: int = Field(default=2, ge=1)
    """How many of the last ones stay; the best one by held-out loss stays too."""
    final: Literal["last", "best"] = "last"
    """Which state becomes the adapter: the last one, or the one with the lowest held-out loss."""
    bits: Literal[4, 8] | None = None
    """Store that adapter in so many bits a value instead of 32; how far off it then is, trimtab inspect says."""


class MemoryRecipe(Memory):
    """Memory, disk and time, one for the other. Nothing that is learnt changes."""

    frozen: Literal["none", "cache", "auto"] = "none"
    """Of blocks below the lowest one in which the adapter acts: compute them each time, or (cache) once for each text,
    and keep the hidden states on disk for later epochs, measurements and runs; auto: where that can be and pays."""


TaskName = Literal["causal-lm", "sequence-classification"]


class Recipe(Config):
    """A fine-tuning run."""

    model: str
    """Folder, hub id or .gguf file of the base."""
    task: TaskName = "causal-lm"
    """What the model does: go on with a text, or (sequence-classification) give a label to each text, by a head that
    belongs to the adapter."""
    data: DataRecipe
    """What is learnt, and what it is measured on."""
    method: str | dict[str, Any] | list[str | dict[str, Any]] = DEFAULT_METHOD
    """The method with its options: lora(rank=16, alpha=32), or a mapping with kind and options; several of them,
    as lora|prefix or as a list, are one adapter. One that begins from data, such as lora(init=eva), is shown the
    first 128 training examples."""
    name: str = "default"
    """Name of the adapter."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps, or go on for so many, whatever epochs says."""
    loss: CrossEntropy = CrossEntropy()
    """What is learnt of each token, beside the likelihood that is reported."""
    optim: OptimRecipe = OptimRecipe()
    """The optimiser and its schedule."""
    batch: BatchRecipe = BatchRecipe()
    """How much data a step sees."""
    eval: EvalRecipe = EvalRecipe()
    """What is measured, and when."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    """What is kept to resume from."""
    dtype: Literal["bfloat16", "float32", "float16", "float64"] | None = None
    """Of the base and its computation; what is trained is kept in float32. Empty is what suits the machine."""
    storage: str | None = None
    """Keep the base's linear layers in few bits while they are used: nf4 (QLoRA's), fp4, int4, int8, int8-group, fp8,
    loftq(rank=16), or gguf (those of a GGUF file as they are); empty keeps them in dtype."""
    exempt: tuple[str, ...] = ()
    """Further layers that stay in dtype, as the head, embeddings and routers do: names, ends of names, or globs; with
    =int8 behind, in that format."""
    average_bits: float | None = None
    """Keep the layers that four bits round worst in int8, up to so many bits a weight on average, scales included."""
    device: str | None = None
    """cpu, cuda, cuda:1; empty is the best there is."""
    memory: MemoryRecipe = MemoryRecipe()
    """Less memory for more time: what is computed again, and what waits in host memory; and less time for disk: what
    is computed once and kept there."""
    seed: int = 0
    """Of the order of the examples, of new tensors, and of dropout."""
    out: str | None = None
    """Folder of the run; empty makes a new one below runs."""
    track: tuple[str, ...] = ()
    """Experiment trackers that follow the run: tensorboard, mlflow, wandb, trackio."""

    @field_validator("memory", mode="before")
    @classmethod
    def _memory(cls, value: Any) -> Any:
        """An engine's memory will do: it says nothing of what lies on disk."""
        return dict(value) if type(value) is Memory else value

    @field_validator("storage")
    @classmethod
    def _storage(cls, value: str | None) -> str | None:
        if value is not None:
            check_storage(value, BLOCKS)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.exempt and self.storage is None:
            raise ValueError("exempt leaves layers out of storage; set storage")
        if self.average_bits is not None and self.storage is None:
            raise ValueError("average_bits is a budget for a base in four bits; set storage")
        if self.data.stream and self.steps is None:
            raise ValueError("the length of a stream is not known; set steps")
        if self.task == "sequence-classification":
            self._classifies()
        measured = self.data.held_out is not None or self.data.fraction
        if not measured and (self.eval.patience or self.checkpoint.final == "best"):
            raise ValueError(
                "early stopping and the best checkpoint need held-out data; set data.held_out or data.fraction"
            )
        return self

    def _classifies(self) -> None:
        if self.data.instruction is not None:
            raise ValueError(
                "data.instruction asks a generator for the label, and a classification head sees the text alone; "
                "leave it out"
            )
        if self.data.stream and self.data.labels is None:
            raise ValueError(
                "the labels of a stream are not known before it is read; set data.labels"
            )


FREE: Any = {
    "out": True,
    "track": True,
    "eval": True,
    "checkpoint": True,
    "device": True,
    "memory": True,
    "model": True,
    "data": {"path": True, "held_out": True, "mix": True},
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
