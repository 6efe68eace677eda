"""Whom and what a soak chooses (`benchmarks.soak`), by its world's own random numbers: a seed says all that is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from benchmarks.soak_laws import law
from benchmarks.soak_world import UNPAGED, Charge, World
from trimtab.data import Datum
from trimtab.engine import SamplingParams
from trimtab.engine.aims import Aim
from trimtab.losses import CISPO, DPO, PPO, ImportanceSampling
from trimtab.optim import CrossEntropy

NAMES = tuple("abcdef")
METHODS = (
    "lora(rank=2)",
    "lora(rank=2, alpha=8)",
    "lora(rank=4, targets=['q_proj', 'v_proj'])",
    "lora(rank=3, targets='all-linear')",
    "lora(rank=2, invocation=(9, 11))",
    "dora(rank=2)",
    "ia3",
    "bitfit",
    "bottleneck(size=4)",
    "loha(rank=2)",
    "oft(block=4)",
    "prefix(length=3)",
    UNPAGED,
    "prompt(length=2)",
    "llama-adapter(length=3)",
    "gated(inner='prefix(length=3)')",
    "spottune(inner='lora(rank=2)', blocks=1)",
    "lora(rank=2)|bitfit|prefix(length=2)",
)
TIERS: tuple[Literal["host", "disk"], ...] = ("host", "disk")
DRAWS = ("spottune",)
"""They draw at random in training, by how their data are laid out, which depends on the others."""
AIMS: tuple[Aim, ...] = (
    "cross_entropy",
    CrossEntropy(label_smoothing=0.1),
    ImportanceSampling(),
    PPO(),
    CISPO(),
    DPO(beta=0.5),
)
Deed = Callable[[World], None]


def text(world: World, least: int = 1, most: int = 70) -> list[int]:
    """Random tokens; half of the texts begin alike."""
    length = world.draw.randint(least, most)
    if world.draw.random() < 0.5:
        return [(7 * place + 3) % 250 for place in range(length)]
    return [world.draw.randrange(1, 256) for _ in range(length)]


def data(world: World, aim: Aim) -> list[Datum]:
    """Examples that bring what their loss needs; in pairs."""
    draw = world.draw
    found = []
    for number in range(draw.choice([2, 2, 4, 8])):
        ids = text(world, 4, 40)
        weights = [0.0, 0.0, *(draw.choice([1.0, 1.0, 0.25, 0.0]) for _ in ids[3:]), 1.0]
        given: dict[str, list[float]] = {}
        if aim in AIMS[2:5]:
            given["logprobs"] = [draw.gauss(-5, 1) for _ in ids]
            given["advantages"] = [draw.gauss(0, 1) for _ in ids]
        found.append(Datum.causal(ids, weights, origin=f"example {number}", **given))
    return found


def params(world: World) -> SamplingParams:
    """Greedy or drawn, with any of what may be asked."""
    draw = world.draw
    found: dict[str, Any] = {"max_tokens": draw.randint(1, 24), "temperature": 0.0}
    if draw.random() < 0.5:
        found |= {"temperature": draw.uniform(0.3, 1.5), "seed": draw.choice([3, 11, None])}
        found |= draw.choice([{}, {"top_p": 0.9}, {"top_k": 7}, {"min_p": 0.1}])
    if draw.random() < 0.3:
        found["stop"] = draw.choice([("e",), ("a", "th", "o"), ("zz",)])
    if draw.random() < 0.2:
        found["repetition_penalty"] = 1.3
    if draw.random() < 0.2:
        found["logprobs"] = draw.randint(0, 4)
    if draw.random() < 0.25:
        found["n"] = draw.randint(2, 3)
    return SamplingParams(**found)


def tenant(world: World) -> Charge | None:
    """One of those that are attached."""
    return world.draw.choice(list(world.charges.values())) if world.charges else None


def paged(charge: Charge | None) -> bool:
    """Whether answers come from pages."""
    return charge is None or charge.method != UNPAGED


def refused(world: World, error: type[Exception], deed: Callable[[], Any]) -> None:
    """It raises this error."""
    try:
        deed()
    except error as found:
        world.errors[type(found).__name__] += 1
        return
    law(False, world, f"{error.__name__} was not raised")
