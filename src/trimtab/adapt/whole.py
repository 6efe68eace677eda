"""Layers that adapters train in full, each adapter a copy of its own: the site looks like the copy of whoever acts.

Code that reads the weight of a head, and does not call it, so sees the one that is trained.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from trimtab.adapt.route import Part
from trimtab.adapt.site import BASE, ORIGINAL, LayerSite

COPIES = "modules_to_save."
"""What slots of copies of a layer's own tensors begin with."""


@final
class WholeSite(LayerSite):
    """A layer that adapters train in full, each a copy. ``weight`` and ``bias`` are those of whoever acts."""

    child: str = ORIGINAL

    @property
    def base_layer(self) -> nn.Module:
        found = self._modules[ORIGINAL]
        assert found is not None
        return found

    @base_layer.setter
    def base_layer(self, layer: nn.Module) -> None:
        self._modules[ORIGINAL] = layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == BASE:
            self._modules[ORIGINAL] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        copied = self._copied(name) if name in ("weight", "bias") else None
        return super().__getattr__(name) if copied is None else copied

    def _copied(self, name: str) -> Tensor | None:
        """The acting adapter's own tensor, where one acts on all rows."""
        owner = self.bank.context(self.training).route.single
        if owner is None or self.covers([Part(owner, None, None, False, 1)]):
            return None
        edits = self.acting(owner, training=self.training)
        if (
            len(edits) != 1
            or name not in edits[0].tensors
            or not edits[0].tensors[name].name.startswith(COPIES)
        ):
            return None
        return edits[0].params(self, self.layer.dtype)[name]
