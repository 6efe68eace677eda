"""What a method says of PEFT: what PEFT calls it, where PEFT has it, and how its options read there and here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from trimtab.adapt.peft_config import read_options
from trimtab.config import Config

if TYPE_CHECKING:
    from trimtab.adapt.contract import Method, Place
    from trimtab.frozen import Layer
    from trimtab.models.anatomy import Anatomy

TIED = "tied"
"""Role of a site whose weight is that of an embedding, and which is edited as it is."""


class InPeft(Config):
    """The part of a `trimtab.adapt.contract.Method` that files of PEFT's are read and written by.

    ``peft_type`` and ``disk`` (slot -> slot in a file) are what PEFT calls it, ``peft_root`` what PEFT puts before the
    path of a module. ``peft_options`` maps PEFT's options to (our field, PEFT's default), ``peft_lacks`` are those that
    we lack with their defaults, ``peft_kinds`` the layer kinds on which PEFT has the same function, and ``peft_drawn``
    the names of tensors that PEFT may write and we draw again.
    """

    kind: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    peft_root: ClassVar[str] = "base_model.model."
    disk: ClassVar[Mapping[str, str]] = {}
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    peft_lacks: ClassVar[Mapping[str, Any]] = {}
    peft_kinds: ClassVar[tuple[str, ...]] = ()
    peft_drawn: ClassVar[tuple[str, ...]] = ()
    disk_beside: ClassVar[Mapping[str, str]] = {}
    """Slot on disk of a part -> its slot where it stands beside others."""

    @property
    def peft_kind(self) -> str | None:
        """What PEFT calls it with these fields; None where it has no such method."""
        return self.peft_type

    @property
    def peft_nests(self) -> bool:
        """Whether PEFT has it, with these fields, on the parameters of experts too (see `trimtab.adapt.nested`)."""
        return False

    @property
    def peft_opens(self) -> bool:
        """Whether PEFT has it, with these fields, inside ``nn.MultiheadAttention`` too (`trimtab.adapt.multihead`)."""
        return False

    @property
    def peft_parts(self) -> int:
        """How many of its parts, the first ones, act on what PEFT calls target modules."""
        return len(cast("Method", self).members)

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        """The paths among these that PEFT wraps, and so calls target modules; what is tied to one goes with it."""
        return list(dict.fromkeys(place.path for place in places if place.role != TIED))

    def peft_differs(self, layer: Layer) -> str:
        """Why PEFT computes something else with this method at such a layer; empty where it does not."""
        return layer.other_in_peft

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """Whether PEFT has this method, and the same function for it in these places."""
        kinds = {anatomy.layer(place.path).kind for place in places} if self.peft_kinds else set()
        return self.peft_type is not None and kinds <= set(self.peft_kinds)

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        """The fields that PEFT's ``adapter_config.json`` needs beside the common ones."""
        fields = dict(self)
        return {theirs: fields[ours] for theirs, (ours, _) in self.peft_options.items()}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Method | None:
        """The method that a PEFT config means, or None when this class does not read it.

        ``slots`` are the names and shapes in the weights file. Raise `FileFormatError` for an option
        that changes the mathematics and that we do not have.
        """
        options = read_options(config, cls.peft_options, cls.peft_lacks, cls.kind)
        return cast("Method", cls(**options))

    @classmethod
    def tensor_from_peft(cls, config: Mapping[str, Any], slot: str, tensor: Tensor) -> Tensor:
        """A tensor of PEFT's file as this method holds it; by default as it is."""
        return tensor

    def roles_in_file(self, path: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The roles of a site read from a PEFT file, from its slots and their shapes."""
        return ("",)
