"""What `benchmarks.methods` runs: two models with their tasks, and the methods with their names in the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FULL, HEAD_ONLY = "full fine-tuning", "head only"
REPLACED = ("full", "tokens", "union", "fusion")
"""Names of the registry that stand below under others. AdapterFusion is left out: it begins from trained adapters."""
VARIANTS = {
    FULL: "full(targets='all')",
    "lora r=2": "lora(rank=2, alpha=4)",
    "rslora": "lora(rslora=true)",
    "lora-pissa": "lora(init='pissa')",
    "lora-olora": "lora(init='olora')",
    "lora-orthogonal": "lora(init='orthogonal')",
    "lora-gaussian": "lora(init='gaussian')",
    "lora-eva": "lora(init='eva')",
    "lora-ga": "lora(init='lora-ga')",
    "lora+": "lora(plus=16)",
    "lora-fa": "lora(frozen_a=true)",
    "lora 8-bit": "lora(bits=8)",
    "prefix mlp": "prefix(hidden=512)",
    "ptuning lstm": "ptuning(encoder='lstm')",
    "oft exact": "oft(series='exact')",
    "piggyback ternary": "piggyback(ternary=true)",
}
"""Name of a row -> method; added to those of the registry."""
RATES = {HEAD_ONLY: 1e-2}
"""Learning rates in the place of a default: that of full training is for whole models, not for a new head."""
MOST_USED = (
    FULL, "lora", "lora r=2", "rslora", "lora-pissa", "dora", "adalora", "vera", "ia3", "bitfit", "bottleneck",
    "prefix", "prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One model and task. ``rows`` are counts: to learn from, to choose the rate by, to report on."""

    name: str
    title: str
    what: str
    factors: tuple[float, ...]
    rows: tuple[int, int, int]
    recipe: Mapping[str, Any]

    @property
    def classifies(self) -> bool:
        """Whether texts are given a label by a head, and not by an answer."""
        return self.recipe.get("task") == "sequence-classification"

    def settings(self) -> dict[str, Any]:
        """What runs must share to be compared."""
        return json.loads(json.dumps({**asdict(self), "recipe": dict(self.recipe)}))


COMMON = {
    "dtype": "bfloat16",
    "checkpoint": {"every": 10**6, "keep": 1},
    "eval": {"samples": 0},
}
MINILM = Bench(
    "minilm",
    "MiniLM, sarcastic headlines",
    "all-MiniLM-L6-v2 (22.7 M) tells sarcastic headlines from plain ones",
    factors=(1.0, 3.0, 10.0, 30.0),
    rows=(640, 200, 500),
    recipe={
        **COMMON,
        "task": "sequence-classification",
        "data": {"max_tokens": 64, "too_long": "right"},
        "epochs": 2,
        "batch": {"size": 16},
        "optim": {"schedule": "linear", "warmup": 0.1},
    },
)
SMOLLM2 = Bench(
    "smollm2",
    "SmolLM2-135M, film reviews",
    "SmolLM2-135M-Instruct answers whether a film review is positive",
    factors=(1.0, 3.0, 10.0),
    rows=(240, 64, 200),
    recipe={
        **COMMON,
        "batch": {"size": 8},
        "optim": {"schedule": "cosine", "warmup": 0.1},
    },
)
BENCHES = {bench.name: bench for bench in (MINILM, SMOLLM2)}


@dataclass(frozen=True)
class Job:
    """One run: a method by its ``name`` in the table and as text, a learning rate and a seed."""

    bench: str
    name: str
    method: str
    factor: float
    seed: int


def methods_of(bench: Bench) -> dict[str, str]:
    """Name -> method, in the order in which they are run."""
    import trimtab as tt

    found = {FULL: VARIANTS[FULL]}
    if bench.classifies:
        found[HEAD_ONLY] = "full(targets=('head',))"
        found["tokens [CLS], [SEP]"] = "tokens(ids=(101, 102))"
    found |= {name: name for name in tt.methods() if name not in REPLACED}
    found |= {name: name for name in _presets()}
    found |= VARIANTS
    if bench.classifies:
        return found
    return {name: found.get(name, name) for name in MOST_USED}


def _presets() -> Sequence[str]:
    from trimtab.adapt.parse import PRESETS

    return tuple(PRESETS)
