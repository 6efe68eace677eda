"""What code that knows PEFT's layers asks of one: a wrapped layer answers in those words.

They tell of all adapters at the place; ``scaling`` and ``r`` are mappings from an adapter's name, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank
    from trimtab.adapt.edit import Edit


class Looks:
    """Read-only views of a site; `trimtab.adapt.site.SiteBase` has what they tell of."""

    base_layer: nn.Module
    path: str
    edits: dict[str, list[Edit]]

    @property
    def bank(self) -> Bank:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer, as it stands there now."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of this place that act where no scope says otherwise."""
        return [name for name in self.bank.active if name in self.edits]

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether none of them acts."""
        return all(name in self.bank.disabled for name in self.active_adapters)

    @property
    def merged_adapters(self) -> list[str]:
        return [name for name in self.bank.merged if name in self.edits]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def scaling(self) -> Mapping[str, float]:
        """Of low-rank methods: what the product of the factors is multiplied by."""
        scales = self.bank.scales
        found = self._field("scaling")
        return {name: value * scales.get(name, 1.0) for name, value in found.items()}

    @property
    def r(self) -> Mapping[str, int]:
        """Of low-rank methods: the rank."""
        return self._field("rank")

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        return self._field("alpha")

    def _field(self, name: str) -> dict[str, Any]:
        """A fact of each adapter's method here, of those that have it."""
        found = {}
        for adapter, edits in self.edits.items():
            for edit in edits:
                method = edit.method
                if name in type(method).model_fields or hasattr(type(method), name):
                    found[adapter] = getattr(method, name)
        return found
