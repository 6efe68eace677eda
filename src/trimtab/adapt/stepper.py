"""What methods do around an optimiser's steps: gradients before, budgets after.

The engine does this by itself. A loop of one's own, or one of another library, does:

    steps = tt.Stepper(adapter, total=1000)
    loss.backward();  steps.before();  optimiser.step();  steps.after();  optimiser.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.contract import Method, Params, Place, Progress


class Stepper:
    """The steps of one attached adapter. ``total`` is how many there will be, for schedules.

    ``memory`` and ``step`` are its whole state.
    """

    def __init__(self, adapter: Adapter, total: int | None = None) -> None:
        self.adapter = adapter
        self.total = total
        self.step = 0
        self.memory: dict[str, Tensor] = {}

    @torch.no_grad()
    def before(self) -> None:
        """After backward and before the optimiser's step."""
        for method, sites, _ in self._each("before_step"):
            method.before_step(sites)

    @torch.no_grad()
    def after(self) -> None:
        """After the optimiser's step and before gradients are cleared."""
        self.step += 1
        progress = Progress(self.step, self.total)
        for method, sites, memory in self._each("after_step"):
            method.after_step(sites, memory, progress)

    def _each(
        self, hook: str
    ) -> Iterator[tuple[Method, Mapping[Place, Params], dict[str, Tensor]]]:
        """The methods that have this hook, with their places and their part of the memory."""
        for number, method in enumerate(self.adapter.methods):
            if method.overrides(hook):
                with self._part(number) as memory:
                    yield method, self._sites(number), memory

    @contextmanager
    def _part(self, number: int) -> Iterator[dict[str, Tensor]]:
        prefix = f"{number}."
        part = {k.removeprefix(prefix): v for k, v in self.memory.items() if k.startswith(prefix)}
        yield part
        others = {k: v for k, v in self.memory.items() if not k.startswith(prefix)}
        self.memory = others | {f"{prefix}{key}": value for key, value in part.items()}

    def _sites(self, number: int) -> dict[Place, Params]:
        names = self.adapter.methods[number].names
        by_path: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.adapter.named().items():
            if name.slot in names:
                by_path.setdefault(name.path, {})[names[name.slot]] = tensor
        places = [Place(""), *self.adapter.places(number)]
        return {place: by_path[place.path] for place in places if place.path in by_path}
