"""What code that knows PEFT's layers asks of one: a wrapped layer answers in those words.

They tell of all adapters at the place; ``scaling`` and ``r`` are mappings from an adapter's name, as there. How far
an adapter goes at this one place can be set: by `set_scale`, or in ``scaling``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.adapt.slots import Slot
from trimtab.errors import ConfigError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank
    from trimtab.adapt.edit import Edit


class Looks:
    """Views of a site, and switches of the model's adapters; `trimtab.adapt.site.SiteBase` has what they tell of."""

    base_layer: nn.Module
    path: str
    edits: dict[str, list[Edit]]

    @property
    @abstractmethod
    def slots(self) -> nn.Module:
        """The module below which the tensors of this place lie."""

    @property
    @abstractmethod
    def bank(self) -> Bank:
        """The bank of the model."""

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer, as it stands there now."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of this place that act where no scope says otherwise."""
        bank = self.bank
        return [n for n in bank.active if n in self.edits and n not in bank.disabled]

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether the bare base is asked for, whoever is active."""
        return self.bank.off

    @property
    def merged_adapters(self) -> list[str]:
        return [name for name in self.bank.merged if name in self.edits]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def scaling(self) -> MutableMapping[str, float]:
        """Of low-rank methods: what the product of the factors is multiplied by; a view that can be written to."""
        return Scaling(self)

    @abstractmethod
    def uncover(self) -> None:
        """Put the frozen layer back where a merged one stands in its place."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """How far an adapter goes at this place: 0 is the base, 1 the adapter as trained.

        An adapter that has no edit here is passed over, as one that is set on all layers of a model.
        """
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ConfigError(
                f"{self.path}: scale of {adapter!r} must be a finite number, not {scale!r}."
            )
        if adapter in self.bank.merged and adapter in self.edits:
            self.uncover()
        for edit in self._scaled(adapter):
            edit.scale = float(scale)

    def _scaled(self, name: str) -> list[Edit]:
        """The edits here that a scale is for: a head that is trained in full beside them has none."""
        if name not in self.edits:
            return []
        adapter = self.bank.require(name)
        beside = adapter.methods[len(adapter.method.members) :]
        return [e for e in self.edits[name] if all(e.method is not full for full in beside)]

    def scale_layer(self, scale: float) -> None:
        """Multiply how far the acting adapters go at this place."""
        for name in self.active_adapters:
            self.set_scale(name, self.edits[name][0].scale * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide it again; without a number, the adapters as trained."""
        if scale == 0:
            raise ConfigError(f"{self.path}: nothing can be divided by a scale of 0; leave it out.")
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.edits[name][0].scale / scale)

    @property
    def r(self) -> Mapping[str, int]:
        """Of low-rank methods: the rank."""
        return self._field("rank")

    @property
    def lora_alpha(self) -> Mapping[str, float]:
        return self._field("alpha")

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The children that hold adapters' tensors."""
        return tuple(name for name, child in self.slots._modules.items() if isinstance(child, Slot))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return ()

    def _get_available_adapters(self) -> set[str]:
        return {name for name in self.edits if name in self.bank.adapters}

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Which adapters act, and learn: in the whole model, for all its layers share one bank.

        Libraries that put adapters into a bare model call this of each layer in turn.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.bank.stack(names)
        self.set_requires_grad([name for name in self.bank.adapters if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters of the whole model act, or none of them."""
        self.bank.off = not enabled

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Whether adapters learn, in the whole model."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            adapter = self.bank.require(name)
            fixed = adapter.fixed
            for key, tensor in adapter.named().items():
                if key not in fixed and isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: an adapter is taken out of a model, not of one layer."""
        raise UnsupportedError(
            f"adapter {adapter_name!r} cannot be taken out layer by layer; take it out of the model with "
            "trimtab.detach(model, name), or use trimtab.peft.get_peft_model, whose models have delete_adapter."
        )

    def _field(self, name: str) -> dict[str, Any]:
        """A fact of each adapter's method here, of those that have it."""
        found = {}
        for adapter, edits in self.edits.items():
            for edit in edits:
                method = edit.method
                if name in type(method).model_fields or hasattr(type(method), name):
                    found[adapter] = getattr(method, name)
        return found


class Scaling(MutableMapping[str, float]):
    """``scaling`` of a site: reading tells what acts now, writing sets how far the edits here go."""

    def __init__(self, site: Looks) -> None:
        self._site = site

    def _own(self) -> dict[str, float]:
        """What the adapters' own fields say, with the scales of whole adapters."""
        scales = self._site.bank.scales
        found = self._site._field("scaling")
        return {name: value * scales.get(name, 1.0) for name, value in found.items()}

    def __getitem__(self, name: str) -> float:
        return self._own()[name] * self._site.edits[name][0].scale

    def __setitem__(self, name: str, value: float) -> None:
        own = self._own()
        if name not in own:
            raise UnknownNameError(f"{self._site.path} has no scaling of {name!r} to set.")
        if own[name] == 0:
            raise ConfigError(f"{self._site.path}: {name!r} has a scaling of 0; set its alpha.")
        self._site.set_scale(name, value / own[name])

    def __delitem__(self, name: str) -> None:
        raise ConfigError(f"{self._site.path}: the scaling of {name!r} goes with its adapter.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._own())

    def __len__(self) -> int:
        return len(self._own())

    def __repr__(self) -> str:
        return repr(dict(self))
