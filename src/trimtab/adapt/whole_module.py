"""Modules of several layers that adapters train in full. Each layer is a site; the names are those of PEFT.

    classifier.original_module.dense.weight             the frozen layer's
    classifier.modules_to_save.support.dense.weight     the adapter's copy

The module is called as ever, and its layers obey the route.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from trimtab.adapt.site import ORIGINAL, SiteBase
from trimtab.adapt.slots import Slot
from trimtab.adapt.whole import COPIES

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank
    from trimtab.adapt.edit import Edit

SAVED = COPIES.rstrip(".")


@final
class WholeModule(SiteBase):
    """A wrapper that gives names, and shows the module as it was and as each adapter has it."""

    def __init__(self, base_layer: nn.Module, path: str, bank: Bank) -> None:
        super().__init__(base_layer, path, bank)
        self.owners: list[str] = []
        """The adapters that train it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def bare(self) -> bool:
        return not self.owners

    def withdraw(self, adapter: str) -> list[Edit]:
        if adapter in self.owners:
            self.owners.remove(adapter)
        return super().withdraw(adapter)

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.bank.chosen if name in self.owners]

    @property
    def original_module(self) -> nn.Module:
        """The frozen module."""
        return _seen(self.base_layer, lambda site: site.frozen)

    @property
    def modules_to_save(self) -> nn.Module:
        """The module by adapter, each with its own layers."""
        shown = Slot()
        for name in self.owners:
            shown.add_module(name, _seen(self.base_layer, partial(_own, name)))
        return shown

    # -- names -----------------------------------------------------------------------------------------

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if remove_duplicate and self in memo:
            return
        memo.add(self)
        yield prefix, self
        sites: dict[str, SiteBase] = {}
        for path, module in self.base_layer.named_modules(memo, "", remove_duplicate):
            if isinstance(module, SiteBase):
                sites[path] = module
            name = _called(path, sites)
            yield f"{prefix}.{name}" if prefix else name, module

    def own_name(self, parts: list[str]) -> list[str]:
        if parts[0] == ORIGINAL:
            return parts[1:]
        if parts[0] == SAVED:
            _, name, *layer, tensor = parts
            return [*layer, SAVED, name, tensor]
        return parts

    def held(self) -> dict[str, Tensor]:
        return {}


def _called(path: str, sites: dict[str, SiteBase]) -> str:
    """PEFT's name of what lies at a path of the module."""
    above = path
    while above and above not in sites:
        above = above.rpartition(".")[0]
    if above not in sites:
        return f"{ORIGINAL}.{path}" if path else ORIGINAL
    rest = path.removeprefix(above).removeprefix(".")
    child = sites[above].child
    if rest == child or rest.startswith(f"{child}."):
        return f"{ORIGINAL}.{above}{rest.removeprefix(child)}"
    if rest.startswith(COPIES):
        name, *more = rest.removeprefix(COPIES).split(".")
        return ".".join([SAVED, name, above, *more])
    return path


def _seen(module: nn.Module, leaf: Callable[[SiteBase], nn.Module]) -> nn.Module:
    """A module with something else in the place of each of its sites; it shares all tensors."""
    if isinstance(module, SiteBase):
        return leaf(module)
    if not any(isinstance(inside, SiteBase) for inside in module.modules()):
        return module
    seen = copy.copy(module)
    seen._modules = {
        name: None if child is None else _seen(child, leaf)
        for name, child in module._modules.items()
    }
    return seen


def _own(adapter: str, site: SiteBase) -> nn.Module:
    """A layer with an adapter's copies of its tensors."""
    held = site._modules.get(SAVED)
    node = None if held is None else held._modules.get(adapter)
    if node is None:
        return site.frozen
    layer = copy.copy(site.frozen)
    layer._parameters = {**site.frozen._parameters, **node._parameters}
    return layer
