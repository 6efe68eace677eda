"""What methods want of training, under trainers that know nothing of it: losses of their own, and budgets of ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.bank import Bank
from trimtab.adapt.site import ExpertsSite, SiteBase
from trimtab.adapt.stepper import Stepper
from trimtab.errors import ConfigError
from trimtab.methods.kasa import LOSS as KASA
from trimtab.methods.kasa import KaSA
from trimtab.methods.monteclora import LOSS as VARIATIONAL
from trimtab.peft.types import PeftType

if TYPE_CHECKING:
    from trimtab.peft.tuner import Tuner


ASIDE = (KASA, VARIATIONAL)
"""Losses that PEFT leaves to its user, who gets them by `kasa_loss` and `monteclora_loss`."""


def kasa_loss(sites: Iterable[SiteBase], names: Collection[str]) -> Tensor | float:
    """What KaSA adds to the loss, as these adapters are now; 0.0 where none is KaSA."""
    total: Tensor | float = 0.0
    for site in sites:
        for edit in [edit for name in names for edit in site.edits.get(name, ())]:
            if isinstance(edit.method, KaSA) and not edit.role:
                leaf = edit.path.rpartition(".")[2]
                holder = site.get_submodule(leaf) if isinstance(site, ExpertsSite) else site
                total = total + edit.method.loss(edit.params(holder, torch.float32))
    return total


def monteclora_loss(bank: Bank | None, names: Collection[str]) -> Tensor | float:
    """What MonteCLoRA adds to the loss, of the draws of the last forward in training; 0.0 where there were none."""
    losses = [] if bank is None else bank.losses
    total: Tensor | float = 0.0
    for name, kind, value in losses:
        if kind == VARIATIONAL and name in names:
            total = total + value
    return total


def with_losses(bank: Bank | None, out: Any) -> Any:
    """A model's output, with the methods' own losses (AdaLoRA's, those of gates) in its loss, where it has one.

    Those that users of PEFT add themselves are left to them.
    """
    loss = getattr(out, "loss", None)
    if bank is not None and isinstance(loss, Tensor) and (own := bank.take_losses(but=ASIDE)):
        out.loss = loss + sum(value.to(loss) for _, _, value in own)
    return out


class Schedule:
    """The budgets of the AdaLoRAs of a model, by adapter."""

    def __init__(self) -> None:
        self._steppers: dict[str, Stepper] = {}

    def allocate(self, tuner: Tuner, step: int) -> None:
        """Weigh the components of the active AdaLoRAs by their gradients, and cut what the budget does not allow.

        Raises:
            ConfigError: no AdaLoRA is active.
            TrainingError: the gradients are gone.
        """
        names = [
            n for n in tuner.active_adapters if tuner.peft_config[n].peft_type == PeftType.ADALORA
        ]
        if not names:
            raise ConfigError(
                f"update_and_allocate is for AdaLoRA, and the active adapters are others: {tuner.active_adapters}."
            )
        for name in names:
            config: Any = tuner.peft_config[name]
            adapter = tuner.require(name)
            stepper = self._of(adapter, config.total_step)
            stepper.step = step - 1
            stepper.after()
            if step >= config.total_step - config.tfinal and config.rank_pattern is None:
                config.rank_pattern = _left(adapter)

    def _of(self, adapter: Adapter, total: int) -> Stepper:
        stepper = self._steppers.get(adapter.name)
        if stepper is None or stepper.adapter is not adapter:
            stepper = self._steppers[adapter.name] = Stepper(adapter, total)
        return stepper


def _left(adapter: Adapter) -> dict[str, list[bool]]:
    """Which components are left, as PEFT's configuration says it."""
    return {
        f"{name.path}.lora_E": (tensor != 0).flatten().tolist()
        for name, tensor in adapter.named().items()
        if name.slot == "lora_E"
    }
