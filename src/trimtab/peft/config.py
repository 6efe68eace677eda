"""PEFT's configurations: mutable values with PEFT's field names, which say what `trimtab.Method` they mean."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from torch import nn

from trimtab.adapt.contract import Method
from trimtab.adapt.disk import read_json, write_json
from trimtab.adapt.files import CONFIG
from trimtab.adapt.parse import methods
from trimtab.errors import ConfigError, UnknownNameError, suggest
from trimtab.peft.defaults import default_targets
from trimtab.peft.hub import local_file, push
from trimtab.peft.kin import related
from trimtab.peft.types import PeftType, TaskType, from_disk, on_disk

C = TypeVar("C", bound=type)
CONFIGS: dict[str, type[PeftConfig]] = {}
"""`PeftType` -> its class."""


@dataclass_transform(kw_only_default=True)
def config(peft_type: str | None = None) -> Callable[[C], C]:
    """A class decorator: a dataclass that refuses unknown options with a suggestion, known under its type."""

    def decorate(cls: C) -> C:
        made: Any = dataclasses.dataclass(kw_only=True, eq=True)(cls)
        made.__init__ = _strict(made.__init__)
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
        unknown = [name for name in values if name not in known]
        if unknown:
            hint = suggest(unknown[0], known) or f" Known: {', '.join(sorted(known))}."
            raise UnknownNameError(f"{type(self).__name__} has no option {unknown[0]!r}.{hint}")
        init(self, **values)

    return strict


@config()
class PeftConfig:
    """What all configurations share. `method` is the method that one means for a model."""

    peft_type: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    """What the names of its parameters begin with."""
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    task_type: TaskType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                hint = suggest(str(self.task_type), list(TaskType))
                raise ConfigError(
                    f"task_type {self.task_type!r} is not one of {', '.join(TaskType)}.{hint}"
                )
            self.task_type = TaskType(self.task_type)

    # -- what it means ---------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The method's own options, as ``adapter_config.json`` holds them."""
        common = {field.name for field in dataclasses.fields(PeftConfig)}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in own.items() if name not in common}

    def method(self, model: nn.Module) -> Method:
        """The method that this means for a model; PEFT's default targets are filled in."""
        options = self.options()
        if "target_modules" in options and not options["target_modules"]:
            options["target_modules"] = default_targets(self.peft_type, model)
        full = tuple(options.pop("modules_to_save", None) or ())
        name = on_disk(self.peft_type)
        found = next(
            made
            for _, cls in methods.items()
            if cls.peft_type == name and (made := cls.from_peft(options, {})) is not None
        )
        return self.begun(found.replace(train=full) if full else found)

    def begun(self, method: Method) -> Method:
        """The method with what only a new adapter needs: how its tensors begin, and how they are trained."""
        return method

    # -- values and files ------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields, with what PEFT calls the method."""
        fields = {f.name: deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"peft_type": on_disk(self.peft_type), **fields}

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
            self.save_pretrained, repo_id, commit_message=commit_message or "Upload config", **options
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or the hub, as the class of its method."""
        file = local_file(pretrained_model_name_or_path, CONFIG, subfolder, **kwargs)
        return cls.from_peft_type(**cls.from_json_file(file))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The options in a file, as they stand there."""
        return {**read_json(Path(path_json_file)), **kwargs}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A configuration of the class that ``peft_type`` names (of this class, without it)."""
        values = dict(kwargs)
        given = values.pop("peft_type", None)
        values.pop("runtime_config", None)  # settings of PEFT's process, not of the adapter
        if given is None:
            return cls(**values)
        known = from_disk(str(given))
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


def _plain(value: Any) -> Any:
    """Sets as sorted lists, so that equal values are equal files."""
    return sorted(value) if isinstance(value, set | frozenset) else value
