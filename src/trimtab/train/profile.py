"""Where the time and the memory of a training step went, by room; and how much of the machine that is.

    of peak = 4 · (P · tokens + H · trained tokens) / (seconds · rate)

with P the parameters of the base that take part in products (without embeddings; of experts those that one token
meets) and H those of the output head, which only a position with a weight needs; 2 operations a token and parameter are
the forward and 2 the backward, because a frozen weight has no gradient of its own. ``rate`` is the best rate at which
this machine multiplied matrices of the base's dtype, measured after the profiled steps. What is computed again for the
backward counts as time and not as work.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import bank_of
from trimtab.adapt.tree import anatomy_of
from trimtab.engine import Engine
from trimtab.engine.rooms import Room
from trimtab.frozen.experts import expert_count
from trimtab.frozen.lowbit import LowBit
from trimtab.models.load import Base
from trimtab.train import facts
from trimtab.train.devices import reached
from trimtab.train.graph import storages
from trimtab.train.page import sized

ROOMS: tuple[Room, ...] = get_args(Room)
PER_TOKEN = 4
"""Operations per token and parameter of the base."""
LASTS = 1.0
"""Seconds for which products of matrices are measured."""
SIZES = {"cpu": (1024, 2048)}
"""Rows and columns of those matrices; on accelerators `LARGER`."""
LARGER = (4096, 8192)


@dataclass(frozen=True)
class RoomUse:
    """Seconds of a step, those of its backward among them, and bytes that are kept for the backward."""

    seconds: float
    backward: float
    kept: int


@dataclass(frozen=True)
class Holdings:
    """Bytes of tensors that are there in each step. ``kept_on_host`` are those that wait there for the backward;
    ``peak`` is the most that the process held, of the accelerator or else of the machine."""

    base: int
    adapter: int
    gradients: int
    optimiser: int
    kept_on_host: int
    peak: int


@dataclass(frozen=True)
class Profile:
    """Of the steps from ``first`` to ``last``, as means of a step. ``parameters`` are P, ``head`` is H, ``rate`` is in
    FLOP/s, and ``reading`` are the seconds that data took before the first step."""

    first: int
    last: int
    tokens: float
    trained: float
    rooms: Mapping[str, RoomUse]
    memory: Holdings
    parameters: int
    head: int
    rate: float
    dtype: str
    device: str
    threads: int
    reading: float

    @property
    def seconds(self) -> float:
        """Of a step: the sum of its rooms."""
        return sum(room.seconds for room in self.rooms.values())

    @property
    def whole(self) -> RoomUse:
        """All rooms together."""
        rooms = self.rooms.values()
        backward, kept = sum(room.backward for room in rooms), sum(room.kept for room in rooms)
        return RoomUse(self.seconds, backward, kept)

    @property
    def rows(self) -> list[tuple[str, RoomUse]]:
        """Each room, and all together."""
        return [*self.rooms.items(), ("in all", self.whole)]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def work(self) -> float:
        """FLOP/s of the base's products."""
        met = self.parameters * self.tokens + self.head * self.trained
        return PER_TOKEN * met / self.seconds

    @property
    def of_peak(self) -> float:
        return self.work / self.rate

    def fields(self) -> dict[str, Any]:
        """As an event holds it."""
        return {"step": self.last, **asdict(self), "seconds": self.seconds, "of_peak": self.of_peak}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Profile:
        """What `fields` gave."""
        values = {name: fields[name] for name in cls.__dataclass_fields__}
        rooms = {name: RoomUse(**use) for name, use in fields["rooms"].items()}
        return cls(**{**values, "rooms": rooms, "memory": Holdings(**fields["memory"])})

    # -- in words -------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """Which steps."""
        if self.first == self.last:
            return f"Profile of step {self.first}"
        return f"Profile of steps {self.first} to {self.last}, mean of a step"

    @property
    def sentences(self) -> list[tuple[str, str]]:
        """What the table does not say, name by name."""
        memory, place = self.memory, f"{self.threads} thread{'s' * (self.threads != 1)}"
        where = place if self.device == "cpu" else self.device
        held = {
            "weights of the base": memory.base, "adapter": memory.adapter, "its gradients": memory.gradients,
            "optimiser": memory.optimiser, "kept for backward": self.whole.kept,
            "kept on the host": memory.kept_on_host,
        }  # fmt: skip
        parts = ", ".join(f"{name} {sized(size)}" for name, size in held.items() if size)
        return [
            (
                "of peak",
                f"{self.of_peak:.1%}: {self.work / 1e9:,.1f} of {self.rate / 1e9:,.1f} GFLOP/s. The work is "
                f"{PER_TOKEN} operations for each token and each of the base's {self.parameters:,} parameters in "
                f"products, and for each trained token and the {self.head:,} of the output head; the peak is the "
                f"fastest product of {self.dtype} matrices measured here ({where}).",
            ),
            (
                "speed",
                f"{self.speed:,.0f} tokens a second, {self.tokens:,.0f} a step, {self.trained:,.0f} of them trained",
            ),
            ("memory", f"{parts}; the most that the process held: {sized(memory.peak)}"),
            (
                "before",
                f"{self.reading:.1f} s of reading and tokenising, before the first step (in no step)",
            ),
            *([FIRST] if self.first == 1 else []),
        ]


FIRST = (
    "careful",
    "the first step of a run is among them; it also pays for what later steps find ready.",
)


# -- what is counted ------------------------------------------------------------------------------------


def holdings(engine: Engine, adapter: Adapter, kept_on_host: int) -> Holdings:
    """What a run holds now."""
    model, bank = engine.model, bank_of(engine.model)
    added = storages(t for one in bank.adapters.values() for t in one.tensors.values())
    base = {**storages(model.parameters()), **storages(model.buffers())}
    own = list(adapter.tensors.values())
    trained = [t for t in own if isinstance(t, nn.Parameter) and t.requires_grad]
    return Holdings(
        base=sum(size for key, (_, size) in base.items() if key not in added),
        adapter=_bytes(own),
        gradients=_bytes(trained),
        optimiser=_bytes(engine.optimiser_tensors(adapter.name)),
        kept_on_host=kept_on_host,
        peak=facts.peak_memory(model.device),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(size for _, size in storages(tensors).values())


def multiplied(base: Base) -> tuple[int, int]:
    """(P, H): the base's parameters that a token is multiplied with, and those of the output head."""
    model = base.model
    anatomy = anatomy_of(model)
    added = {id(t) for one in bank_of(model).adapters.values() for t in one.tensors.values()}
    last = [anatomy.modules[path] for path in anatomy.head]
    heads = {id(module._parameters.get("weight")) for module in last}
    looked_up = {
        id(module.weight)
        for module in anatomy.modules.values()
        if isinstance(module, nn.Embedding) and id(module.weight) not in heads
    }
    counted = [p for p in model.parameters() if id(p) not in added | looked_up]
    stored = sum(module.weights for module in model.modules() if isinstance(module, LowBit))
    idle = 0.0
    chosen = int(getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 0)
    for path in set(anatomy.experts.values()) if chosen else ():
        module = anatomy.modules[path]
        names = [p.rpartition(".")[2] for p, holder in anatomy.experts.items() if holder == path]
        count = expert_count(module, names[0])
        idle += _count(module, added) * (1 - min(chosen, count) / count)
    head = sum(_count(module, added) for module in last)
    return round(sum(p.numel() for p in counted) + stored - idle) - head, head


def _count(module: nn.Module, added: set[int]) -> int:
    """The parameters of a frozen module; of those in few bits, the values that they stand for."""
    stored = module.weights if isinstance(module, LowBit) else 0
    return stored + sum(p.numel() for p in module.parameters() if id(p) not in added)


def best_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest product of square matrices here, tried for about a second."""
    best, began = 0.0, time.perf_counter()
    while not best or time.perf_counter() - began < LASTS:
        for size in SIZES.get(device.type, LARGER):
            best = max(best, reached(dtype, device, size))
    return best
