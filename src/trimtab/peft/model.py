"""`PeftModel`: a model and its adapters, with PEFT's names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.hub import PushToHubMixin

from trimtab.adapt.acting import using
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.plan import check_function
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, DuplicateNameError, UnknownNameError
from trimtab.peft.card import write_card
from trimtab.peft.config import PeftConfig
from trimtab.peft.delegates import Delegates
from trimtab.peft.encoded import has_encoder
from trimtab.peft.errors import PeftWarning
from trimtab.peft.files import compare_names, read_folder, write_folder
from trimtab.peft.hub import push
from trimtab.peft.kin import related
from trimtab.peft.kinds import tuner_class
from trimtab.peft.names import keep_names
from trimtab.peft.state import LoadResult, check_embeddings, replace_tensors
from trimtab.peft.status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
)
from trimtab.peft.types import PeftType


@related
class PeftModel(Delegates, PushToHubMixin, nn.Module):  # type: ignore[misc]
    """A model with adapters. What is not here is asked of the tuner, and of the model inside it."""

    heads: ClassVar[tuple[str, ...]] = ()
    """Modules of this task that are trained in full, where the model has them."""
    base_model: nn.Module
    """The tuner; of a model that began with a prompt, the user's model, as in PEFT."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        adapter: Adapter | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config = self._prepared(peft_config, model)
        made = tuner_class(config.peft_type)
        tuner = made(model, {adapter_name: config}, adapter_name, adapter=adapter, home=self)
        self.__dict__["_tuner"] = tuner
        beside = self._modules.copy()
        self._modules.clear()
        if beside:  # a prompt: PEFT puts no tuner around the model
            self.base_model = model
            self._modules.update(beside)
            keep_names(self, "base_model")
        else:
            self.base_model = tuner
        self.tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _prepared(self, given: PeftConfig, model: nn.Module) -> PeftConfig:
        """A copy of a configuration for this model; the user's own is left as it is."""
        if not isinstance(given, PeftConfig):
            raise ConfigError(
                f"a configuration of trimtab.peft is needed, not {type(given).__name__}"
                f"{' of another package' if type(given).__name__.endswith('Config') else ''}."
            )
        config = given.copied()
        name = model.__dict__.get("name_or_path") or None
        config.base_model_name_or_path = name or config.base_model_name_or_path
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        own = [head for head in self.heads if head in names]
        if own and "modules_to_save" in config.options():
            listed = list(getattr(config, "modules_to_save", None) or ())
            config.modules_to_save = [*listed, *(h for h in own if h not in listed)]  # type: ignore[attr-defined]
        elif own:
            warnings.warn(
                f"{type(config).__name__} has no modules_to_save, as PEFT's has none: {own[0]!r} stays as it is.",
                category=PeftWarning,
                stacklevel=4,
            )
        return config

    # -- adapters --------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configurations, by name."""
        return self.tuner.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        return self.tuner.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.tuner.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> PeftType:
        return PeftType(self.active_peft_config.peft_type)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts now."""
        return bool(self.active_adapters) and not self.tuner.off

    @property
    def modules_to_save(self) -> set[str] | None:
        """The modules that any adapter trains in full."""
        named = (getattr(config, "modules_to_save", None) for config in self.peft_config.values())
        found = {name for names in named for name in names or ()}
        return found or None

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach another new adapter, of any method; it acts once `set_adapter` says so."""
        if adapter_name in self.peft_config:
            raise DuplicateNameError(f"there is an adapter {adapter_name!r} already.")
        self.tuner.add(adapter_name, self._prepared(peft_config, self.get_base_model()))
        self.tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> LoadResult:
        """Attach a saved adapter. Where the name is taken, that adapter becomes the saved one, whole.

        Whether the model trains or evaluates is left as it is.
        """
        _refuse(key_mapping=key_mapping, ephemeral_gpu_offload=ephemeral_gpu_offload)
        present = self.tuner.adapters.get(adapter_name)
        trained = present is not None and has_encoder(present)
        config, adapter = read_folder(model_id, adapter_name, is_trainable, trained=trained, **hub)
        compare_names(adapter, self.get_base_model())
        if present is not None:
            check_function(adapter, anatomy_of(self.get_base_model()))
        if present is not None and replace_tensors(present, adapter):
            self.peft_config[adapter_name] = config
            return LoadResult([], [])
        if present is not None:
            active = list(self.active_adapters)
            self.tuner.replace(adapter_name, config, adapter)
            self.tuner.set_adapter(active)
            warnings.warn(
                f"adapter {adapter_name!r} was of another configuration; it is now the one in {model_id}. An "
                "optimizer made before does not know its parameters.",
                category=PeftWarning,
                stacklevel=2,
            )
        else:
            self.tuner.add(adapter_name, config, adapter)
        self.tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        return LoadResult([], [])

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Which adapter acts, or which several."""
        self.tuner.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.tuner.delete_adapter(adapter_name)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Whether adapters are trained, whichever act."""
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base inside the ``with``, bit for bit."""
        with using(self.get_base_model(), None) if self.peft_config else nullcontext():
            yield

    # -- files -----------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write adapters: ``default`` into the folder, any other into a folder of its name below.

        Each is whole or not there at all, and what else lies in the folder stays. Embeddings are never copied.
        """
        if not safe_serialization:
            raise ConfigError("adapters are written as safetensors only; nothing is ever pickled.")
        check_embeddings(save_embedding_layers)
        if path_initial_model_for_weight_conversion is not None:
            raise ConfigError(
                "path_initial_model_for_weight_conversion is not needed: the base was never changed. "
                "trimtab.peft.save_as_lora writes the plain LoRA of twice the rank."
            )
        if hub and not push_to_hub:
            raise UnknownNameError(
                f"save_pretrained has no option {next(iter(hub))!r}; those of push_to_hub need push_to_hub=True."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        folder = Path(save_directory)
        for name in names:
            self.tuner.require(name)
        if not is_main_process:
            return
        for name in names:
            where = folder if name == "default" else folder / name
            write_folder(self.tuner, name, where, state_dict)
        if names:
            write_card(folder, self.tuner, names)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": folder.name, **hub})

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> PeftModel:
        """A model with the adapter of a folder or a repository, in the class of its task."""
        _refuse(key_mapping=key_mapping, ephemeral_gpu_offload=ephemeral_gpu_offload)
        found, adapter = read_folder(model_id, adapter_name, is_trainable, config=config, **hub)
        compare_names(adapter, model)
        from trimtab.peft.task_models import class_of

        made = class_of(found.task_type) if cls is PeftModel else cls
        return made(model, found, adapter_name, autocast_adapter_dtype, adapter=adapter)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> Any:
        """Write the adapters, as `save_pretrained` does, into a repository on the hub.

        Adapters are one file each, whatever ``max_shard_size``. ``options`` are those of `trimtab.peft.hub.push`.
        """
        return push(
            self.save_pretrained,
            repo_id,
            commit_message=commit_message or "Upload model",
            **options,
        )

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write or complete the README of a folder of adapters."""
        write_card(Path(output_dir), self.tuner)

    # -- facts -----------------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        return self.tuner.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many values are trained, and how many there are."""
        return count_values(self)

    def print_trainable_parameters(self) -> None:
        """Print how many values are trained, of how many."""
        trained, every = self.get_nb_trainable_parameters()
        print(  # noqa: T201 (what it is for)
            f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The layers that adapters edit; see `trimtab.peft.status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """What is attached, in all; see `trimtab.peft.status`."""
        return get_model_status(self)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `trimtab.peft.convert_to_lora` makes a LoRA of this adapter."""
        return not self.tuner.require(adapter_name).method.unmergeable

    # -- being a model ---------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; ``adapter_names`` gives each row an adapter, or ``"__base__"``."""
        with self.tuner.routed(adapter_names):
            return self.tuner(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The model's generate, with an adapter for each prompt if ``adapter_names`` are given."""
        with self.tuner.routed(adapter_names):
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_tuner" not in self.__dict__:  # not made yet
                raise
            return getattr(self.tuner, name)


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ConfigError(f"{name} is not supported by trimtab.peft.")


def count_values(model: nn.Module) -> tuple[int, int]:
    """How many values of a model are trained, and how many there are."""
    counts = [(_count(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)


def _count(parameter: nn.Parameter) -> int:
    """Values of a parameter; bitsandbytes packs two of four bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
