"""Layers that lie in a module inside their wrapper, with the tensors of a part that stands beside others.

PEFT wraps an embedding of which rows are trained beside a LoRA twice over; so the names are

    embed_tokens.token_adapter.base_layer.weight
    embed_tokens.token_adapter.trainable_tokens_delta.default
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import nn

from trimtab.adapt.edit import Edit
from trimtab.adapt.site import BASE, LayerSite


def inner(edit: Edit, beside: Mapping[str, str]) -> str:
    """The module in which an edit's tensors lie; ``beside`` is `Method.disk_beside` of the method as a whole."""
    found = (beside[held.name] for held in edit.tensors.values() if held.name in beside)
    return next(found, "").rpartition(".")[0]


class Inside(nn.Module):
    """The module inside such a wrapper. Its forward is never called."""


@final
class InsideSite(LayerSite):
    """A layer that adapters edit, which lies in a module of that name inside the wrapper."""

    def __init__(self, name: str, base_layer: nn.Module, *given: Any) -> None:
        self.__dict__["inside"], self.__dict__["child"] = name, f"{name}.{BASE}"
        super().__init__(base_layer, *given)

    @property
    def slots(self) -> nn.Module:
        found = self._modules[self.__dict__["inside"]]
        assert found is not None
        return found

    @property
    def base_layer(self) -> nn.Module:
        found = self._wrapped()
        assert found is not None
        return found

    @base_layer.setter
    def base_layer(self, layer: nn.Module) -> None:
        self._modules.setdefault(self.__dict__["inside"], Inside())
        self.slots._modules[BASE] = layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == BASE:  # a module, which torch would make a child of the site itself
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _wrapped(self) -> nn.Module | None:
        inside = self.__dict__.get("_modules", {}).get(self.__dict__["inside"])
        return None if inside is None else inside._modules.get(BASE)
