"""What stands between a `PeftModel` and its model: adapters by name, which of them act, and which are trained.

It is the ``base_model`` of a `PeftModel` (or beside it, where that began with a prompt), and by itself what PEFT calls
a tuner: ``base_model.model`` is the user's model, changed in place. Parameters have PEFT's names, in state dicts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.adapt.acting import rows, stack
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.attach import attach, detach
from trimtab.adapt.bank import Bank, bank_of, find_bank
from trimtab.adapt.inside import InsideSite
from trimtab.adapt.merge import fold, merge_in_place, unmerge
from trimtab.adapt.multihead import MultiheadSite
from trimtab.adapt.site import ExpertsSite, Site
from trimtab.adapt.tree import sites_of, walk
from trimtab.errors import AttachError, ConfigError, DuplicateNameError, UnknownNameError, suggest
from trimtab.models.repeat import own_blocks, repeated, restore_blocks
from trimtab.peft.adapters import cast_adapter_dtype
from trimtab.peft.asked import Asked
from trimtab.peft.combination import Combination, Signs
from trimtab.peft.config import PeftConfig
from trimtab.peft.encoded import PROMPTS
from trimtab.peft.kin import register
from trimtab.peft.names import keep_names, link_tied
from trimtab.peft.schedule import Schedule, kasa_loss, monteclora_loss, with_losses
from trimtab.peft.weighted import combined, config_of


class Tuner(Asked, nn.Module):
    """Adapters of one model. ``peft_config`` maps names to configurations, as PEFT's tuners take them.

    With one configuration instead, the adapter is put into the model, beside any that were put there so, and the tuner
    is of no more use: the model's attribute ``peft_config`` then says what is in it.
    """

    prefix: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    """The method that it begins with; empty for any."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: Mapping[str, PeftConfig] | PeftConfig,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        adapter: Adapter | None = None,
        home: nn.Module | None = None,
    ) -> None:
        injected = isinstance(peft_config, PeftConfig)
        present = model.__dict__.get("peft_config") if injected else None
        if (find_bank(model) is None) != (not present):
            raise AttachError(
                f"{type(model).__name__} has adapters already. Add another with model.add_adapter(name, config), or "
                "take them out first with model.unload()."
            )
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        if self.peft_type not in ("", config.peft_type):
            raise ConfigError(
                f"{type(self).__name__} does not begin with a {type(config).__name__}; get_peft_model(model, config) "
                "finds the class that does."
            )
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = present or {}
        self.active_adapters: list[str] = list(bank_of(model).chosen) if present else []
        self._inference: set[str] = set()
        self._schedule = Schedule()
        self._home = (
            () if home is None else (home,)
        )  # in a tuple, so that torch does not take it for a child
        keep_names(self, "model")
        self.add(adapter_name, config, adapter)
        if injected:  # nothing is around the model: by this name others find the configurations
            model.__dict__["peft_config"] = self.peft_config

    # -- adapters --------------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, **_: Any
    ) -> None:
        """Attach the adapter that ``peft_config`` has under this name."""
        config = self.peft_config.pop(adapter_name)  # PEFT's models put it there first
        self.add(adapter_name, config)
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def add(self, name: str, config: PeftConfig, adapter: Adapter | None = None) -> Adapter:
        """Attach an adapter of a configuration, or a loaded one. The first becomes the active one."""
        trainable = not config.inference_mode
        repeats = repeated(walk(self.model))
        config.prepare(self.model)
        try:
            adapter = self._attached(name, config, adapter)
        except BaseException:
            if repeated(walk(self.model)) is not repeats:
                restore_blocks(self.model)
            raise
        self.peft_config[name] = config
        if not trainable:
            self._inference.add(name)
        self.active_adapters = self.active_adapters or [name]
        self._refresh()
        if name not in self.active_adapters:
            self._train(adapter, False)
        return adapter

    def _attached(self, name: str, config: PeftConfig, adapter: Adapter | None) -> Adapter:
        trainable = not config.inference_mode
        adapter = adapter or config.made(self.adapters, name)
        if adapter is None:
            # PEFT draws from torch's own generator, so that a script's seed decides
            seed = int(torch.randint(2**31, ()))
            method = config.method(self.model)
            adapter = attach(
                self.model, method, name, seed=seed, trainable=trainable, batches=config.batches
            )
            config.begin(adapter, seed)
        else:
            adapter = attach(self.model, adapter, name, trainable=trainable)
        if self._home and adapter.method.peft_root == PROMPTS:
            bank_of(self.model).lodge(name, self._home[0])
        link_tied(self.model, adapter)
        return adapter

    def replace(self, name: str, config: PeftConfig, adapter: Adapter) -> None:
        """Put a loaded adapter in the place of the one of that name."""
        old = detach(self.model, name)
        try:
            self.add(name, config, adapter)
        except BaseException:
            self.add(name, self.peft_config[name], old)
            raise

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Signs = "total",
    ) -> None:
        """Attach a new adapter that is a weighted combination of attached ones; `trimtab.peft.weighted` has the kinds.

        It acts once `set_adapter` says so. ``svd_full_matrices`` changes nothing: the vectors it would add are cut
        off again.

        Raises:
            DuplicateNameError: there is an adapter of that name.
            ConfigError: options that do not fit one another, or the adapters.
            UnsupportedError: an adapter is no change of weights and has no sum with the others.
        """
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method
        )
        made = combined(self.model, list(adapters), list(weights), adapter_name, how)
        self.add(adapter_name, config_of(made, self.peft_config[adapters[0]]), made)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; if it was the only active one, the first of the others becomes active."""
        self.require(adapter_name)
        self.unmerge_adapter()
        detach(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self._inference.discard(adapter_name)
        left = [name for name in self.active_adapters if name != adapter_name]
        self.active_adapters = left or list(self.peft_config)[:1]
        if self.peft_config:
            self.set_adapter(self.active_adapters)

    @property
    def targeted_module_names(self) -> list[str]:
        """The modules that any adapter edits."""
        paths = (site.path for adapter in self.adapters.values() for site in adapter.sites)
        return list(dict.fromkeys(paths))

    @property
    def bank(self) -> Bank | None:
        return find_bank(self.model)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name."""
        return {} if self.bank is None else self.bank.adapters

    def require(self, name: str) -> Adapter:
        """The adapter of that name."""
        if name not in self.adapters:
            known = list(self.adapters)
            raise UnknownNameError(
                f"there is no adapter {name!r}.{suggest(name, known) or f' There are: {known}.'}"
            )
        return self.adapters[name]

    # -- who acts, who learns --------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Which adapters act; they are trained, unless they were loaded for inference, and the others are not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.require(name)
        if len(set(names)) != len(names):
            raise DuplicateNameError(f"{names} names an adapter twice.")
        if self.merged and set(names) != set(self.merged):
            self.unmerge_adapter()
        self.active_adapters = names
        self._refresh()
        for name, adapter in self.adapters.items():
            learns = name in names and not inference_mode and name not in self._inference
            self._train(adapter, learns)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Whether adapters are trained, whichever act."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train(self.require(name), requires_grad)
            self._inference.discard(name)

    def _train(self, adapter: Adapter, learns: bool) -> None:
        fixed = adapter.fixed
        for name, tensor in adapter.named().items():
            if isinstance(tensor, nn.Parameter) and name not in fixed:
                tensor.requires_grad_(learns)

    def _refresh(self) -> None:
        if self.bank is not None:
            stack(self.model, self.active_adapters)

    @property
    def off(self) -> bool:
        """Whether the model is the bare base, whoever is active."""
        return self.bank is not None and self.bank.off

    def disable_adapter_layers(self) -> None:
        """The model is the bare base, until `enable_adapter_layers`."""
        if self.bank is not None:
            self.bank.off = True

    def enable_adapter_layers(self) -> None:
        if self.bank is not None:
            self.bank.off = False

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Rows with adapters of their own inside the ``with``; PEFT's models call it by this name."""
        with self.routed(kwargs.pop("adapter_names", None)):
            yield

    @contextmanager
    def routed(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        """One adapter a row, ``"__base__"`` being none; without names, whoever is active."""
        if adapter_names is None or self.bank is None:
            yield
            return
        with rows(self.model, [None if n == "__base__" else n for n in adapter_names]):
            yield

    # -- merging ---------------------------------------------------------------------------------------

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters whose merged weights stand in the place of the base's."""
        return () if self.bank is None else self.bank.merged

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put merged weights in the place of the base's, which are kept beside them, bit for bit."""
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self.require(name)
        merge_in_place(self.model, names, finite=safe_merge)

    def unmerge_adapter(self) -> None:
        """The base's own weights again."""
        if self.bank is not None:
            unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The model with the adapters in its weights, and nothing of them beside."""
        self.unmerge_adapter()
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        for name in names:
            self.require(name)
        fold(self.model, names, finite=safe_merge)
        if self._repeats():
            own_blocks(self.model)
        self._forget()
        return self.model

    def unload(self) -> nn.Module:
        """The model as it was, without adapters."""
        self.unmerge_adapter()
        for name in list(self.adapters):
            detach(self.model, name)
        if self._repeats():
            restore_blocks(self.model)
        self._forget()
        return self.model

    def _repeats(self) -> bool:
        """Whether an adapter had the model's layers repeated."""
        return any(
            config.options().get("layer_replication") for config in self.peft_config.values()
        )

    def _forget(self) -> None:
        self.peft_config.clear()
        self.active_adapters = []
        self._inference.clear()

    # -- being a model ---------------------------------------------------------------------------------

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are kept in fp32; without ``autocast_adapter_dtype``, in the dtype of the layer they edit."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return with_losses(self.bank, self.model(*args, **kwargs))
        except KeyboardInterrupt:
            if self.bank is not None:
                self.bank.close()
            raise

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's budget: call it after each step of the optimizer, before gradients are cleared."""
        self._schedule.allocate(self, global_step)

    def _get_kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """KaSA's own loss, to be added to that of the task; PEFT's users call it by this name."""
        return kasa_loss(sites_of(self.model).values(), self._these(adapter_names))

    def _get_monteclora_loss(
        self, adapter_names: str | Sequence[str] | None = None
    ) -> Tensor | float:
        """MonteCLoRA's own loss, of the last forward, to be added to that of the task."""
        return monteclora_loss(self.bank, self._these(adapter_names))

    def _these(self, names: str | Sequence[str] | None) -> list[str]:
        """The adapters of these names; by default those that act."""
        given = self.active_adapters if names is None else names
        return [given] if isinstance(given, str) else list(given)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not made yet
                raise
            return getattr(self.model, name)


register(Tuner, "BaseTuner")
for _kind in (Site, InsideSite, MultiheadSite, ExpertsSite):
    register(_kind, "BaseTunerLayer")  # no module that is trained in full: PEFT's is none either
