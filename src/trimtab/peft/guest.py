"""Our tuner inside a model of the package ``peft`` itself.

TRL's trainers hand a ``peft_config`` to ``peft.get_peft_model``, which makes one of PEFT's own models and asks its
tables for the tuner of ``config.peft_type`` (see `trimtab.peft.kin`). It finds `Guest`, so the adapters, their
parameters and what they compute are ours; the model around them, its files and its switches are PEFT's, which asks
the tuner's class by the methods below. ``transformers`` asks in the same way when ``model.add_adapter(config)`` puts
adapters into a model with nothing around it.

Such a model writes what PEFT writes, and no ``trimtab.json``: so a method that PEFT lacks is refused there, with what
to do instead. Models of `trimtab.peft.get_peft_model` know no such bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.adapt.adapter import Adapter, TensorName
from trimtab.adapt.bank import CHILD, bank_of
from trimtab.adapt.files import disk_key
from trimtab.adapt.site import SiteBase
from trimtab.errors import FileFormatError, UnsupportedError
from trimtab.peft.config import PeftConfig
from trimtab.peft.encoded import has_encoder
from trimtab.peft.find import root_of
from trimtab.peft.kin import register
from trimtab.peft.names import own_names, tree_names, unwrapped
from trimtab.peft.task_models import class_of
from trimtab.peft.tuner import Tuner
from trimtab.peft.types import OURS, on_disk

_LENT = "_modules_to_save_lent"
_ROOTS = ("base_model.model.", "model.", "")


class Unwrapped(nn.Module):
    """Adapters that wrap no layer (prompts), as one of the layers of which PEFT's models ask how adapters stand."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, tuner: Guest) -> None:
        super().__init__()
        self._tuner = (tuner,)  # in a tuple, so that torch does not take it for a child

    @property
    def disable_adapters(self) -> bool:
        return self._tuner[0].off

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner[0].active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._tuner[0].merged)

    def _get_available_adapters(self) -> set[str]:
        return set(self._tuner[0].adapters)


register(Unwrapped, "BaseTunerLayer")


class Guest(Tuner):
    """A `Tuner` that PEFT's code makes and asks."""

    tuner_layer_cls = SiteBase
    uses_shared_state = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: Mapping[str, PeftConfig] | PeftConfig,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        injected = isinstance(peft_config, PeftConfig)
        given = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        taken = self._taken(given, model)
        super().__init__(model, taken if injected else {adapter_name: taken}, adapter_name)
        self._known_to_peft(adapter_name, injected)
        self.unwrapped = Unwrapped(self)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, **_: Any
    ) -> None:
        """Attach the adapter that ``peft_config`` has under this name: PEFT's models put it there first."""
        self.peft_config[adapter_name] = self._taken(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype)
        self._known_to_peft(adapter_name, False)

    def _known_to_peft(self, name: str, injected: bool) -> None:
        """Refuse what PEFT's files cannot hold; the model is as it was then."""
        adapter, config = self.require(name), self.peft_config[name]
        wrong = None
        if on_disk(config.peft_type).startswith(OURS):
            wrong = "PEFT lacks this method"
        elif has_encoder(adapter):
            wrong = "a folder of PEFT's has no place for the encoder that makes the prompt"
        elif not (adapter.origin.in_peft and adapter.method.peft_reads):
            wrong = "PEFT cannot hold this method in these places"
        elif injected and adapter.method.peft_root != "base_model.model.":
            wrong = "this method edits no layer, and a bare model's files have no place for it"
        if wrong is not None:
            self.delete_adapter(name)
            raise UnsupportedError(
                f"{type(config).__name__} in a model of the package peft: {wrong}, so its files could not be written. "
                "Make the model with trimtab.peft.get_peft_model(model, config), and hand that over in place of a "
                "peft_config."
            )

    @staticmethod
    def _taken(given: PeftConfig, model: nn.Module) -> PeftConfig:
        """A copy of a configuration. Heads that PEFT's classes would wrap themselves are left to our adapter alone.

        Those classes add their task's heads to ``modules_to_save``, whether or not the model has them, and wrap what
        it names when the tuner is made; so the given configuration lends the list to the copy.
        """
        config = given.copied()
        heads = class_of(given.task_type).heads
        if not heads or "modules_to_save" not in given.__dict__:
            return config
        named = [*given.__dict__.pop(_LENT, ()), *(given.__dict__["modules_to_save"] or ())]
        present = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        kept = [n for n in dict.fromkeys(named) if n not in heads or n in present]
        config.__dict__["modules_to_save"] = kept or None
        given.__dict__["modules_to_save"] = None
        given.__dict__[_LENT] = kept
        return config

    # -- what PEFT asks a tuner's class when it saves and loads ----------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor],
        unwanted_adapter_names: Sequence[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """An adapter's tensors by their keys in a file, out of a state dict of the model."""
        adapter, bare = _adapter(model, adapter_name)
        keys = _keys(model, adapter, state_dict)
        return {_file_key(adapter, n, bare): state_dict[k].detach() for n, k in keys.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`_get_adapter_state_dict` gives keys without it already."""
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a file holds, by the names of the model's parameters.

        Raises:
            FileFormatError: the file's tensors are not exactly the adapter's.
        """
        adapter, bare = _adapter(model, adapter_name)
        own = model.state_dict()
        wanted = {_file_key(adapter, name, bare): name for name in adapter.named()}
        extra = [k for k in state_dict if k not in wanted and ".base_layer." not in k]
        missing = [k for k in wanted if k not in state_dict]
        if missing or extra:
            raise FileFormatError(
                f"these are not the tensors of adapter {adapter_name!r}: {len(missing)} missing"
                f"{f', e.g. {missing[0]!r}' if missing else ''}; {len(extra)} unexpected"
                f"{f', e.g. {extra[0]!r}' if extra else ''}."
            )
        keys = _keys(model, adapter, own)
        return {keys[name]: state_dict[key] for key, name in wanted.items()}


def _adapter(model: nn.Module, name: str) -> tuple[Adapter, bool]:
    """An adapter of a model, and whether nothing is around that model."""
    return bank_of(model).require(name), CHILD in model._modules


def _file_key(adapter: Adapter, name: TensorName, bare: bool) -> str:
    key = disk_key(adapter, name)
    return key.removeprefix(adapter.method.peft_root) if bare else key


def _keys(model: nn.Module, adapter: Adapter, state: Mapping[str, Tensor]) -> dict[TensorName, str]:
    """The names of an adapter's tensors in a state dict of the model, or of one around it."""
    base = root_of(model)
    own, found = own_names(base), {}
    for name, here in tree_names(base, adapter).items():
        known = [
            f"{root}{unwrapped(key)}" for key in (here, own.get(here, here)) for root in _ROOTS
        ]
        if not (there := [key for key in known if key in state]):
            raise FileFormatError(
                f"state_dict has no {known[0]!r}, which adapter {adapter.name!r} needs."
            )
        found[name] = there[0]
    return found
