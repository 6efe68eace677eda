"""The module tree with and without wrappers: canonical paths, and putting wrappers in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from trimtab.adapt.site import WRAPPED, SiteBase
from trimtab.adapt.slots import Slot
from trimtab.models.anatomy import Anatomy

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank


def bare_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Canonical path -> module of the bare model, in order. Wrappers and slots are looked through."""
    return _walked(root)[0]


def _walked(root: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Modules by canonical path; and the further paths of shared modules -> their canonical path."""
    from trimtab.adapt.bank import Bank

    found: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    again: dict[str, str] = {}

    def walk(module: nn.Module, path: str) -> None:
        if isinstance(module, Bank | Slot):
            return
        if isinstance(module, SiteBase):
            module = module.frozen
        if id(module) in first:
            again[path] = first[id(module)]
            return
        first[id(module)] = path
        found[path] = module
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(root, "")
    inside = {
        f"{alias}{path[len(shared) :]}": path
        for alias, shared in again.items()
        for path in found
        if path.startswith(f"{shared}.")
    }
    return found, again | inside


def anatomy_of(root: nn.Module) -> Anatomy:
    """The anatomy of a model, whether or not adapters are attached; a model with adapters keeps it."""
    from trimtab.adapt.bank import CHILD, Bank

    bank = root._modules.get(CHILD)
    if isinstance(bank, Bank):
        return bank.known.anatomy(root, *_walked(root))
    return Anatomy(root, *_walked(root))


def canonical(path: str) -> str:
    """A path in the wrapped tree -> the path in the bare model."""
    return ".".join(segment for segment in path.split(".") if segment not in WRAPPED)


def sites_of(root: nn.Module) -> dict[str, SiteBase]:
    """Canonical path -> wrapper, for all wrappers in the tree."""
    return {m.path: m for m in walk(root) if isinstance(m, SiteBase)}


def walk(root: nn.Module) -> Iterator[nn.Module]:
    """The model's modules and wrappers, each once; but nothing that holds adapters' tensors: many are not a cost."""
    from trimtab.adapt.bank import Bank

    seen: set[int] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if id(module) in seen or isinstance(module, Bank | Slot):
            continue
        seen.add(id(module))
        yield module
        if isinstance(
            module, SiteBase
        ):  # what lies inside a layer that a merged one covers is there still
            waiting.append(module.frozen)
        waiting.extend(child for child in reversed(module._modules.values()) if child is not None)


def uncover(root: nn.Module, bank: Bank) -> None:
    """Put the frozen layers back where merged ones stand in their place."""
    if bank.merged:
        for site in sites_of(root).values():
            site.uncover()
        bank.merged = ()


class Children:
    """Where each module of a model is a child (several parents may share one), to replace many after one pass."""

    def __init__(self, root: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in walk(root):
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` is a child."""
        places = self._places.pop(id(old))
        for parent, name in places:
            parent._modules[name] = new
        self._places[id(new)] = places
