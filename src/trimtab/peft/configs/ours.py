"""Configurations of the methods that PEFT lacks: made from the methods' own options, and PEFT's common ones.

Where they act is said as for all others: ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and
``modules_to_save`` stand for a method's ``targets``, ``exclude``, ``layers`` and ``train``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from trimtab.adapt.contract import Method
from trimtab.adapt.parse import method_from, methods
from trimtab.errors import ConfigError
from trimtab.peft.config import CONFIGS, PeftConfig, config, option
from trimtab.peft.configs import make_known
from trimtab.peft.configs.common import Excluding, Layered, listed
from trimtab.peft.types import PeftType, from_disk

_WHERE = {
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "train": "modules_to_save",
}
"""Fields of all methods, and what PEFT calls them."""


@config()
class Ours(Excluding, Layered):
    """A method of Trimtab's own."""

    kind: ClassVar[str] = ""
    own_default: ClassVar[bool] = True

    def meant(self, options: Mapping[str, Any]) -> Method:
        names = [name for name in methods.get(self.kind).model_fields if name not in _WHERE]
        own = {name: options[name] for name in names}
        return methods.get(self.kind).parse(own, where=type(self).__name__)

    def check(self) -> None:
        super().check()
        if self.kind:
            self.meant(self.options())

    @classmethod
    def told(cls, method: Method, options: Mapping[str, Any]) -> PeftConfig:
        said = method.to_dict()
        where = {
            theirs: listed(said[ours])
            for ours, theirs in _WHERE.items()
            if dict(method)[ours] != type(method).model_fields[ours].default
        }
        common = {f.name: options[f.name] for f in fields(PeftConfig) if f.name in options}
        return super().told(method, {**said, **where, **common})


@config(PeftType.UNION)
class UnionConfig(PeftConfig):
    """Any method, or several as one adapter, as `trimtab.method` reads them: ``"lora(rank=8)|prefix(length=30)"``."""

    parts: Any = option("The method, or a list of methods: texts, mappings or values.", default="")
    modules_to_save: list[str] | None = option(
        "Modules that are trained in full beside it, such as a new head.", default=None
    )

    def meant(self, options: Mapping[str, Any]) -> Method:
        return method_from(self.parts)

    def check(self) -> None:
        super().check()
        if not self.parts:
            raise ConfigError(
                "UnionConfig: parts is needed, for example parts='lora(rank=8)|prefix(length=30)'."
            )
        method_from(self.parts)

    @classmethod
    def told(cls, method: Method, options: Mapping[str, Any]) -> PeftConfig:
        return super().told(method, {**options, "parts": method.replace(train=()).to_dict()})


def _made(peft_type: PeftType, kind: str, name: str) -> Any:
    """The class of a method's options."""
    method = methods.get(kind)
    own = {n: f for n, f in method.model_fields.items() if n not in _WHERE}
    values = {
        n: option(f.description or "", default=f.get_default(call_default_factory=True))
        for n, f in own.items()
    }
    text = (method.__doc__ or "").partition("\n\n")[0]
    body = {
        "__module__": __name__,
        "__doc__": f"`trimtab.methods.{method.__module__.rpartition('.')[2]}`: {text}",
        "__annotations__": {"kind": "ClassVar[str]", **{n: _type(f.annotation) for n, f in own.items()}},
        "kind": kind,
        **values,
    }  # fmt: skip
    return config(peft_type)(type(name, (Ours,), body))


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


AdaFitConfig = _made(PeftType.ADAFIT, "adafit", "AdaFitConfig")
AdapterPlusConfig = _made(PeftType.ADAPTERPLUS, "adapterplus", "AdapterPlusConfig")
BitFitConfig = _made(PeftType.BITFIT, "bitfit", "BitFitConfig")
BottleneckConfig = _made(PeftType.BOTTLENECK, "bottleneck", "BottleneckConfig")
CompacterConfig = _made(PeftType.COMPACTER, "compacter", "CompacterConfig")
DiffPruningConfig = _made(PeftType.DIFF, "diff", "DiffPruningConfig")
DiReftConfig = _made(PeftType.DIREFT, "direft", "DiReftConfig")
FullConfig = _made(PeftType.FULL, "full", "FullConfig")
GatedConfig = _made(PeftType.GATED, "gated", "GatedConfig")
LoReftConfig = _made(PeftType.LOREFT, "loreft", "LoReftConfig")
MoraConfig = _made(PeftType.MORA, "mora", "MoraConfig")
NoReftConfig = _made(PeftType.NOREFT, "noreft", "NoReftConfig")
ParallelConfig = _made(PeftType.PARALLEL, "parallel", "ParallelConfig")
PfeifferConfig = _made(PeftType.PFEIFFER, "pfeiffer", "PfeifferConfig")
PiggybackConfig = _made(PeftType.PIGGYBACK, "piggyback", "PiggybackConfig")
SpotTuneConfig = _made(PeftType.SPOTTUNE, "spottune", "SpotTuneConfig")
make_known()


def config_of(said: Mapping[str, Any], options: Mapping[str, Any]) -> PeftConfig:
    """The configuration of a method as ``trimtab.json`` says it, with the common options of ``adapter_config.json``."""
    method = method_from(said)
    first, *others = method.members
    if first.peft_type and others and all(part.kind == "tokens" for part in others):
        method_type = from_disk(first.peft_type)  # trainable_token_indices beside a LoRA
        if method_type is not None:
            return CONFIGS[method_type].told(method, options)
    own = {cls.kind: cls for cls in CONFIGS.values() if issubclass(cls, Ours)}
    theirs = from_disk(method.peft_type) if method.peft_type else None
    cls = own.get(method.kind) or CONFIGS[theirs or PeftType.UNION]
    return cls.told(method, options)
