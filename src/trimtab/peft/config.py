"""PEFT's configurations: mutable values with PEFT's field names, which say what `trimtab.Method` they mean."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast, dataclass_transform

import torch
from torch import nn

from trimtab.adapt.adapter import Adapter
from trimtab.adapt.contract import Init, Method
from trimtab.adapt.disk import read_json, write_json
from trimtab.adapt.files import CONFIG
from trimtab.adapt.files import OURS as DESCRIPTION
from trimtab.adapt.parse import of_peft_type
from trimtab.errors import ConfigError, UnknownNameError, UnsupportedError, suggest
from trimtab.peft.hub import local_file, push
from trimtab.peft.kin import related
from trimtab.peft.types import OURS, PeftType, TaskType, from_disk, on_disk

C = TypeVar("C", bound=type)
CONFIGS: dict[str, type[PeftConfig]] = {}
"""`PeftType` -> its class; all are there once `trimtab.peft.configs` is imported."""

GRAMMAR = "0.21.2"
"""The release of PEFT whose files ours are like."""


def option(about: str, *, default: Any) -> Any:
    """An option of a configuration, said in a line. A list or a mapping is made anew for each."""
    metadata = {"help": about}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=type(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
def config(peft_type: str | None = None) -> Callable[[C], C]:
    """A class decorator: a dataclass that refuses unknown options with a suggestion, known under its type."""

    def decorate(cls: C) -> C:
        made: Any = dataclasses.dataclass(kw_only=True, eq=True)(cls)
        made.__init__ = _strict(made.__init__)
        made.__doc__ = _documented(made)
        if peft_type is not None:
            made.peft_type = PeftType(peft_type)
        final: C = related(made)
        if peft_type is not None:
            CONFIGS[peft_type] = final
        return final

    return decorate


def _strict(init: Callable[..., None]) -> Callable[..., None]:
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @wraps(init)
    def strict(self: Any, **values: Any) -> None:
        given = values.pop("peft_type", None)  # PEFT's classes take it, though each is of one type
        if given is not None and from_disk(str(given)) != (self.peft_type or None):
            raise ConfigError(
                f"{type(self).__name__} is of type {on_disk(self.peft_type)}, not {given!r}."
            )
        unknown = [name for name in values if name not in known]
        if unknown:
            hint = suggest(unknown[0], known) or f" Known: {', '.join(sorted(known))}."
            raise UnknownNameError(f"{type(self).__name__} has no option {unknown[0]!r}.{hint}")
        init(self, **values)

    return strict


def _documented(cls: type) -> str:
    """The class's text, and a line for each option."""
    lines = [
        f"    {field.name}: {field.metadata.get('help', '')}" for field in dataclasses.fields(cls)
    ]
    text = (cls.__doc__ or "").partition("\n\nOptions:")[0]
    return f"{text}\n\nOptions:\n" + "\n".join(lines)


@config()
class PeftConfig:
    """What all configurations share. `method` is the method that one means for a model."""

    peft_type: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    """What the names of its parameters begin with."""
    is_prompt_learning: ClassVar[bool] = False
    """Whether a `PeftModel` is to keep a prompt of its own beside its tuner: never here, where prompts are adapters
    like others. ``isinstance(config, PromptLearningConfig)`` tells which methods are prompts."""
    is_adaption_prompt: ClassVar[bool] = False
    lacks: ClassVar[Mapping[str, str]] = {}
    """Options that Trimtab has only at their defaults -> what there is instead."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Options that lie from 0 to below 1."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Options that are whole numbers from 1 on."""

    batches = cast("Any", None)  # no field
    """What the model is called with where an adapter begins from data; for the next new adapter alone."""

    task_type: TaskType | str | None = option(
        "What the model is for; decides the class of the model around it.", default=None
    )
    auto_mapping: dict[str, Any] | None = option(
        "The base model's class, where a file says it.", default=None
    )
    peft_version: str | None = option("The PEFT that wrote a file.", default=None)
    base_model_name_or_path: str | None = option("The base model.", default=None)
    revision: str | None = option("The base model's revision.", default=None)
    inference_mode: bool = option("Whether the adapter is not to be trained.", default=False)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                hint = suggest(str(self.task_type), list(TaskType))
                raise ConfigError(
                    f"task_type {self.task_type!r} is not one of {', '.join(TaskType)}.{hint}"
                )
            self.task_type = TaskType(self.task_type)
        self.check()

    def check(self) -> None:
        """Refuse values that no model can have.

        Raises:
            ConfigError: a value that does not fit.
            UnsupportedError: an option that Trimtab lacks is set away from its default.
        """
        kind, values = type(self).__name__, {f.name: f for f in dataclasses.fields(self)}
        for name, instead in self.lacks.items():
            value = getattr(self, name)
            if value and value != _default(values[name]):
                raise UnsupportedError(
                    f"{kind}: {name}={value!r} is not in Trimtab. {instead}".rstrip()
                )
        for name in self.sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{kind}: {name} must be a whole number from 1 on, not {value!r}."
                )
        for name in self.shares:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(f"{kind}: {name} must lie from 0 to below 1, not at {value!r}.")

    # -- what it means ---------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The method's own options, as ``adapter_config.json`` holds them."""
        common = {field.name for field in dataclasses.fields(PeftConfig)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in own.items() if name not in common}

    def method(self, model: nn.Module) -> Method:
        """The method that this means for a model.

        Raises:
            TargetError: modules are named that the model lacks, or none, and there is no default.
            ConfigError, UnsupportedError: values that do not fit (it may have been changed since it was made).
        """
        self.check()
        found = self.begun(self.read(self.options(), model), model)
        full = tuple(self.__dict__.get("modules_to_save") or ())
        return found.replace(train=full) if full else found

    def read(self, options: dict[str, Any], model: nn.Module) -> Method:
        """The method of these options, at its places in a model."""
        return self.meant(options)

    def meant(self, options: Mapping[str, Any]) -> Method:
        """The method of these options, read as those of a file are."""
        name, values = on_disk(self.peft_type), {**options}
        values.pop("modules_to_save", None)
        return next(
            made for cls in of_peft_type(name) if (made := cls.from_peft(values, {})) is not None
        )

    def begun(self, method: Method, model: nn.Module) -> Method:
        """The method with what only a new adapter needs: how its tensors begin, and how they are trained."""
        return method

    def prepare(self, model: nn.Module) -> None:
        """Change what has to be changed of the model's structure before anything is attached; no weight ever is."""

    def made(self, adapters: Mapping[str, Adapter], name: str) -> Adapter | None:
        """The adapter, where it is made of others that are attached; None where it begins by itself."""
        return None

    def first_values(self) -> Mapping[str, Init]:
        """Slots that begin elsewhere than the method lets them."""
        return {}

    @torch.no_grad()
    def begin(self, adapter: Adapter, seed: int) -> None:
        """Give an adapter that was just attached the `first_values`."""
        first, generator = self.first_values(), torch.Generator().manual_seed(seed)
        for name, tensor in adapter.named().items() if first else ():
            if name.slot in first:
                tensor.copy_(first[name.slot](tuple(tensor.shape), generator))

    @classmethod
    def told(cls, method: Method, options: Mapping[str, Any]) -> PeftConfig:
        """The configuration of a method that Trimtab wrote in a form that PEFT does not read.

        ``options`` are what ``adapter_config.json`` says all the same.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in known})

    # -- values and files ------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields, with what PEFT calls the method."""
        fields = dataclasses.asdict(self)
        version = {"peft_version": self.peft_version or GRAMMAR}
        return {"peft_type": on_disk(self.peft_type), **fields, **version}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into a folder."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; name a folder to save the configuration in.")
        folder.mkdir(parents=True, exist_ok=True)
        mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise UnknownNameError(f"save_pretrained has no option {next(iter(kwargs))!r}.")
        fields = {name: _plain(value) for name, value in self.to_dict().items()}
        write_json(folder / CONFIG, fields | ({"auto_mapping": mapping} if mapping else {}))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> Any:
        """Write ``adapter_config.json`` into a repository on the hub; ``options`` are `trimtab.peft.hub.push`'s."""
        return push(
            self.save_pretrained,
            repo_id,
            commit_message=commit_message or "Upload config",
            **options,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or the hub, as the class of its method."""
        place = pretrained_model_name_or_path
        values = cls.from_json_file(local_file(place, CONFIG, subfolder, **kwargs))
        if str(values.get("peft_type")).startswith(OURS):
            described = local_file(place, DESCRIPTION, subfolder, **kwargs)
            return _told(read_json(described)["methods"][0], values)
        return cls.from_peft_type(**values)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The options, unchanged, if a configuration can be made of them."""
        cls.from_peft_type(**kwargs)
        return kwargs

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The options in a file, as they stand there."""
        return {**read_json(Path(path_json_file)), **kwargs}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A configuration of the class that ``peft_type`` names (of this class, without it)."""
        values = dict(kwargs)
        given = values.pop("peft_type", None)
        given = getattr(given, "value", given)  # an enum, PEFT's or ours
        values.pop("runtime_config", None)  # settings of PEFT's process, not of the adapter
        if given is None:
            return cls(**values)
        import_module("trimtab.peft.configs")
        known = from_disk(str(given))
        if known not in CONFIGS:
            import_module("trimtab.peft.configs.ours")
        if known is None or known not in CONFIGS:
            names = sorted(on_disk(name) for name in CONFIGS)
            hint = suggest(str(given), names) or f" Known: {', '.join(names)}."
            raise UnknownNameError(f"peft_type {given!r} is not a method that Trimtab has.{hint}")
        return CONFIGS[known](**values)

    def copied(self) -> Self:
        """A copy that shares nothing."""
        return deepcopy(self)


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """A configuration from a mapping with its ``peft_type``."""
    return PeftConfig.from_peft_type(**config_dict)


def _told(method: Mapping[str, Any], values: Mapping[str, Any]) -> PeftConfig:
    """The configuration of a folder of Trimtab's own."""
    ours: Any = import_module("trimtab.peft.configs.ours")
    found: PeftConfig = ours.config_of(method, values)
    return found


def _plain(value: Any) -> Any:
    """Sets as sorted lists, so that equal values are equal files; a nested configuration as a mapping."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return sorted(value) if isinstance(value, set | frozenset) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
