"""What is known of a base with adapters: its anatomy and its fingerprint, kept until its modules or weights change.

Finding both takes most of an attachment, and they are the same for every adapter. That they still hold is seen by
looking at each module and tensor once: another module or tensor, one that was moved or cast, or one that was written
into (as autograd counts writes, so not through ``.data``) makes them anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from weakref import ref

from torch import Tensor, nn

from trimtab.adapt.fingerprint import Fingerprint, fingerprint
from trimtab.frozen import stamp
from trimtab.models.anatomy import Anatomy


class Known:
    """Of one base; empty at first."""

    def __init__(self) -> None:
        self._anatomy: Anatomy | None = None
        self._parameters = _Seen()
        self._fingerprint: Fingerprint | None = None
        self._tensors = _Seen()

    def anatomy(
        self, root: nn.Module, modules: dict[str, nn.Module], aliases: Mapping[str, str]
    ) -> Anatomy:
        """The anatomy of ``root``, whose bare modules are these now."""
        now = Anatomy(root, modules, aliases)
        again = self._parameters.again(_parameters(modules))
        if self._anatomy is None or not again or not _same(self._anatomy, now):
            self._anatomy = now
        return self._anatomy

    def fingerprint(self, anatomy: Anatomy) -> Fingerprint:
        """The fingerprint of the base of this anatomy."""
        tensors = [*_parameters(anatomy.modules), *_buffers(anatomy.modules)]
        again = self._tensors.again(tensors, (stamp(tensors), [_place(t) for t in tensors]))
        if self._fingerprint is None or not again:
            self._fingerprint = fingerprint(anatomy.root, anatomy.modules)
        return self._fingerprint


class _Seen:
    """Some tensors, not kept alive, and what was true of them."""

    def __init__(self) -> None:
        self._refs: list[ref[Tensor]] = []
        self._fact: object = None

    def again(self, tensors: Iterable[Tensor], fact: object = None) -> bool:
        """Whether they are the very ones of the last time, with the same fact. Remembers these."""
        now = list(tensors)
        same = len(now) == len(self._refs) and fact == self._fact
        if same and all(seen() is tensor for seen, tensor in zip(self._refs, now, strict=True)):
            return True
        self._refs, self._fact = [ref(tensor) for tensor in now], fact
        return False


def _same(one: Anatomy, other: Anatomy) -> bool:
    """Whether both are of the same modules at the same paths."""
    return (
        one.root is other.root
        and one.config is other.config
        and one.aliases == other.aliases
        and list(one.modules) == list(other.modules)
        and all(one.modules[path] is module for path, module in other.modules.items())
    )


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    return (t for m in modules.values() for t in m._parameters.values() if t is not None)


def _buffers(modules: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    return (t for m in modules.values() for t in m._buffers.values() if t is not None)


def _place(tensor: Tensor) -> int:
    """Where its values lie: another place where ``.data`` was set."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    return tensor.data_ptr() if plain else 0
