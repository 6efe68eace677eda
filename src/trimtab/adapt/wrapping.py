"""Putting wrappers around a model's layers: which kind each place gets."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

from torch import nn

from trimtab.adapt.bank import Bank
from trimtab.adapt.inside import InsideSite
from trimtab.adapt.multihead import MultiheadSite
from trimtab.adapt.site import ExpertsSite, Site, SiteBase
from trimtab.adapt.tree import Children, sites_of
from trimtab.adapt.whole import WholeSite
from trimtab.adapt.whole_module import WholeModule
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy


class Wrapping:
    """The model's modules and wrappers, as one attachment changes them."""

    def __init__(self, model: nn.Module, bank: Bank, anatomy: Anatomy) -> None:
        self._model = model
        self._bank = bank
        self._anatomy = anatomy
        self.sites = sites_of(model)

    @cached_property
    def _children(self) -> Children:
        return Children(self._model)

    def wrap(self, path: str, site: SiteBase) -> None:
        """Put a new wrapper in the place of the module at a path."""
        self._children.replace(self._anatomy.modules[path], site)
        self.sites[path] = site

    def site(self, path: str, *, whole: bool = False, within: str = "") -> SiteBase:
        """The wrapper at a path, made if there is none yet.

        ``whole`` is for a layer that is trained in full, ``within`` for one in a module of that name.
        """
        anatomy = self._anatomy
        where = anatomy.parameters.get(path, path)
        if where in anatomy.apart:
            raise TargetError(
                f"{path!r} is called once per adapter in a mixed batch, so no adapter can edit it as a whole; target "
                "the layers inside it."
            )
        if where not in self.sites:
            site = self._made(where, path, whole, within)
            if anatomy.inside(where, nn.TransformerEncoderLayer):
                site.register_forward_pre_hook(_no_fast_path)
                self._bank.keep_padding(anatomy.modules.values())
            self.wrap(where, site)
        if isinstance(self.sites[where], MultiheadSite) != (path in anatomy.opened):
            raise TargetError(
                f"{where!r}: an adapter edits the output of this attention, and another its projections; torch "
                "computes both at once, so only one of the two can be edited. Leave it out of the targets of either."
            )
        return self.sites[where]

    def whole_module(self, path: str, adapter: str) -> None:
        """Wrap a module of several layers that an adapter trains in full, unless a wrapper is about it or inside."""
        others = {p for p, site in self.sites.items() if isinstance(site, WholeModule)} - {path}
        if any(p.startswith(f"{path}.") or path.startswith(f"{p}.") for p in others):
            return
        if path not in self.sites:
            self.wrap(path, WholeModule(self._anatomy.modules[path], path, self._bank))
        site = self.sites[path]
        if isinstance(site, WholeModule):
            site.owners.append(adapter)

    def _made(self, where: str, path: str, whole: bool, within: str) -> SiteBase:
        anatomy, module = self._anatomy, self._anatomy.modules[where]
        if path in anatomy.opened:
            return MultiheadSite(cast(nn.MultiheadAttention, module), where, self._bank)
        if path in anatomy.experts:
            return ExpertsSite(module, where, self._bank)
        given = module, where, self._bank, anatomy.width_at(where), anatomy.root
        if within:
            return InsideSite(within, *given)
        return WholeSite(*given) if whole else Site(*given)


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Nothing; but where a layer has a hook, torch's own encoder calls its layers instead of reading their weights."""
