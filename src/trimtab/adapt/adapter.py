"""An adapter: a method, the sites it was resolved to, its tensors, and a name.

A value: it can be created, saved, loaded, compared, added and scaled with no model in memory. While it
is attached, its tensors are the model's own parameters; detaching hands them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from trimtab.adapt import slots
from trimtab.adapt.contract import Method, Place
from trimtab.adapt.fingerprint import Fingerprint
from trimtab.adapt.parse import methods
from trimtab.errors import UnsupportedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """One resolved site: where, in what role, and by which of the adapter's methods."""

    path: str
    role: str
    method: int


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor of an adapter: its site's path (empty for the whole adapter's) and its slot."""

    path: str
    slot: str

    @property
    def key(self) -> str:
        return f"{self.path}.{self.slot}" if self.path else self.slot


@dataclass
class Origin:
    """Where an adapter comes from: written into its folder, never needed to use it.

    Four of them are what PEFT's config says of the base: target modules by the ends of their names,
    weights stored (in, out), and whether PEFT can read the adapter at all.
    """

    base_name: str | None = None
    task_type: str | None = None
    suffixes: tuple[str, ...] | None = None
    transposed: bool = False
    in_peft: bool = True
    plain_in_peft: bool | None = None
    """Whether PEFT can read its form to share, where it cannot read the adapter itself."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Path -> checksum, in bf16, of the copy of the base's weight that PEFT's file held."""
    repeats: tuple[tuple[int, int], ...] = ()
    """The ranges of its base's blocks that are repeated (`trimtab.models.repeat`), as PEFT's file says."""
    rebuilt: frozenset[str] = frozenset()
    """Slots that the file left out, because its base makes them again when the adapter is attached."""
    provenance: dict[str, Any] = field(default_factory=dict)


def whole(method: Method) -> tuple[Method, ...]:
    """The parts of a method (itself, if it is no union), and the one that trains modules in full, if any are."""
    train = tuple(dict.fromkeys(path for part in (method, *method.members) for path in part.train))
    tie = any(dict(part).get("tie", False) for part in method.members)
    options = {"targets": train, "tie": True} if tie else {"targets": train}
    return (*method.members, *([methods.get("full").parse(options)] if train else []))


class Adapter:
    """See the module. ``method`` is what the user chose; ``methods`` are those with sites: see `whole`."""

    def __init__(
        self,
        name: str,
        method: Method,
        sites: Sequence[SiteSpec],
        tensors: Mapping[TensorName, Tensor],
        *,
        base: Fingerprint | None = None,
        origin: Origin | None = None,
    ) -> None:
        slots.check_name(name)
        self.name = name
        self.method = method
        self.methods = whole(method)
        self.sites = tuple(sites)
        self.base = base
        self.origin = origin or Origin()
        self.drawn: dict[str, str] = {}
        """Checksums by key of the tensors that are drawn again instead of stored; empty before attaching."""
        self._tensors: dict[TensorName, Tensor] = dict(tensors)
        self._holders: dict[TensorName, nn.Module] = {}
        self._redrawn: dict[TensorName, nn.Module] = {}

    @property
    def attached(self) -> bool:
        return bool(self._holders)

    def named(self) -> dict[TensorName, Tensor]:
        """All tensors by name; live parameters while attached."""
        if self._holders:
            return {n: slots.get(holder, n.slot, self.name) for n, holder in self._holders.items()}
        return dict(self._tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by key (``model.layers.0.self_attn.q_proj.lora_A.weight``)."""
        return {name.key: tensor for name, tensor in self.named().items()}

    def at_site(self, path: str) -> dict[str, Tensor]:
        """The tensors of one site, by slot."""
        return {name.slot: tensor for name, tensor in self.named().items() if name.path == path}

    @property
    def fixed(self) -> set[TensorName]:
        """The tensors that are never trained."""
        return self.fixed_among(self.named())

    def fixed_among(self, names: Iterable[TensorName]) -> set[TensorName]:
        """Those of these tensors that its methods never train."""
        said = self._said(lambda method: method.fixed)
        return {name for name in names if name.slot in said.get(name.path, ())}

    @property
    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by key, where they are not 1.

        The parts of a union learn at their own default rates, relative to the first's.
        """
        said = self._said(lambda method: method.rates.items())
        own = {
            n.key: factor for n in self.named() for slot, factor in said[n.path] if slot == n.slot
        }
        for name, number in self.owners.items():
            if number < len(self.method.members):
                pace = self.method.pace(self.methods[number])
                own[name.key] = own.get(name.key, 1.0) * pace
        return {key: factor for key, factor in own.items() if factor != 1.0}

    @property
    def owners(self) -> dict[TensorName, int]:
        """The number of the method that each tensor belongs to."""
        here: dict[str, list[int]] = {"": list(range(len(self.methods)))}
        for site in self.sites:
            numbers = here.setdefault(site.path, [])
            if site.method not in numbers:
                numbers.append(site.method)
        return {name: self._owner(here[name.path], name.slot) for name in self.named()}

    def _owner(self, numbers: Sequence[int], slot: str) -> int:
        """Which of these methods a slot is of: one that names it; else one that names none of its slots."""
        known = {n: self.methods[n].names or self.methods[n].disk for n in numbers}
        naming = [n for n, slots_of in known.items() if slot in slots_of]
        return next(iter(naming or [n for n in numbers if not known[n]] or numbers))

    def _said(self, facts: Callable[[Method], Iterable[T]]) -> dict[str, list[T]]:
        """What the methods at each path (empty for the whole adapter) say of their slots."""
        found = {"": [fact for method in self.methods for fact in facts(method)]}
        for site in self.sites:
            found.setdefault(site.path, []).extend(facts(self.methods[site.method].at(site.path)))
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters; only an attached adapter has them."""
        for tensor in self.named().values():
            if isinstance(tensor, nn.Parameter):
                yield tensor

    def share(self, site: SiteSpec, path: str) -> None:
        """Let it act at another path as it does at a site, with tensors that are equal at first."""
        self.sites = (*self.sites, SiteSpec(path, site.role, site.method))
        for name, tensor in self.named().items():
            if name.path == site.path:
                self._tensors[TensorName(path, name.slot)] = tensor.clone()
        self.origin = replace(self.origin, in_peft=False, plain_in_peft=None)

    def check_whole(self, deed: str) -> None:
        """Raise where tensors are left to be made from the base, so that this cannot be done without it."""
        if self.origin.rebuilt:
            raise UnsupportedError(
                f"adapter {self.name!r} keeps first factors that PEFT left out of its file, because its base makes "
                f"them again; attach it to that base before you {deed} it."
            )

    def places(self, method: int = 0) -> list[Place]:
        return [Place(site.path, site.role) for site in self.sites if site.method == method]

    @property
    def count(self) -> int:
        """Number of trained values."""
        fixed = self.fixed
        return sum(tensor.numel() for name, tensor in self.named().items() if name not in fixed)

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.named().values())

    # -- files -----------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, bits: Literal[4, 8] | None = None) -> Path:
        """Write the adapter folder, atomically; see `trimtab.adapt.files`. ``bits`` rounds its matrices."""
        from trimtab.adapt.files import save

        return save(self, Path(folder), bits)

    @classmethod
    def load(cls, folder: str | Path, *, name: str | None = None) -> Adapter:
        """Read an adapter folder, ours or PEFT's; ``name`` renames it."""
        from trimtab.adapt.files import load

        return load(Path(folder), name=name)

    # -- values ----------------------------------------------------------------------------------------

    def detached(self, *, name: str | None = None) -> Adapter:
        """An independent copy, not attached to anything."""
        copied = {n: t.detach().clone() for n, t in self.named().items()}
        copy = Adapter(
            name or self.name, self.method, self.sites, copied, base=self.base, origin=self.origin
        )
        copy.drawn = dict(self.drawn)
        return copy

    def __eq__(self, other: object) -> bool:
        """Same methods, sites and bitwise equal tensors; names and provenance do not matter."""
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = self.named(), other.named()
        return (
            self.method == other.method
            and set(self.sites) == set(other.sites)
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[n].cpu(), theirs[n].cpu()) for n in mine)
        )

    __hash__ = None  # type: ignore[assignment]  # mutable while it trains

    def __repr__(self) -> str:
        methods = " + ".join(method.kind for method in self.methods)
        return (
            f"Adapter({self.name!r}, {methods}, {len(self.sites)} sites, {self.count:,} parameters)"
        )

    # -- used by attach --------------------------------------------------------------------------------

    def bind(
        self, holders: Mapping[TensorName, nn.Module], redrawn: Mapping[TensorName, nn.Module]
    ) -> None:
        """Hand the tensors over to the model that holds them now; ``redrawn`` are those that are not stored."""
        self._holders, self._redrawn = dict(holders), dict(redrawn)
        self._tensors = {}

    @property
    def held(self) -> dict[TensorName, nn.Module]:
        """The module below which each tensor lies, while attached."""
        return {**self._holders, **self._redrawn}

    def move(self, old: nn.Module, new: nn.Module) -> None:
        """Let another module hold what lies directly below one."""
        for holders, stored in ((self._holders, True), (self._redrawn, False)):
            for name in [name for name, holder in holders.items() if holder is old]:
                tensor = slots.get(old, name.slot, self.name)
                slots.withdraw(old, name.slot, self.name)
                slots.add(new, name.slot, self.name, tensor, stored=stored)
                holders[name] = new

    def unbind(self) -> None:
        """Take the tensors back from the model."""
        self._tensors = {name: tensor.detach() for name, tensor in self.named().items()}
        self._holders, self._redrawn = {}, {}
