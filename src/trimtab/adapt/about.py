"""What a method says of itself, for ``trimtab methods`` and for the documentation.

Nothing is written twice: the title, the source and the formula are those of the docstring of the method's module,
the example that of its class, options are its fields, and the defaults of training its class facts. First values
are those of the tensors that it states.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic_core import PydanticUndefined
from torch import nn

from trimtab.adapt import parse
from trimtab.adapt.contract import Init, Method
from trimtab.adapt.describe import states
from trimtab.errors import TrimtabError

HOOKS = {
    "enter": "enter", "delta": "delta", "leave": "leave",
    "keys_values": "attention", "beside": "attention", "virtual_embeddings": "prompt",
    "before_step": "schedule", "after_step": "schedule",
}  # fmt: skip
"""What a method may override -> what its edit is called; a schedule works between optimiser steps."""
GATE, OF_PARTS = "gate", "those of its parts"
_SOURCE = re.compile(r"\(([^()]*(?:\b(?:19|20)\d\d\b|\bours\b|\bno paper\b)[^()]*)\)")


@dataclass(frozen=True)
class Option:
    """One field of a method."""

    name: str
    kind: str
    default: str
    text: str


@dataclass(frozen=True)
class About:
    """The facts of one method; texts are plain."""

    name: str
    title: str
    purpose: str
    source: str
    formula: str
    example: str
    edits: tuple[str, ...]
    merges: bool
    why_not: str
    lr: float
    weight_decay: float
    peft: str | None
    options: tuple[Option, ...]
    first_values: Mapping[str, str]

    @property
    def formula_line(self) -> str:
        """The first line of the formula."""
        return self.formula.partition("\n")[0]

    @property
    def merging(self) -> str:
        """Whether it merges, or why it does not."""
        return "yes" if self.merges else f"no: {self.why_not}"


def about(name: str, *, first_values: bool = False) -> About:
    """The facts of a registered method; ``first_values`` builds a small model to see what tensors start from.

    Raises:
        UnknownNameError: no such method.
    """
    cls = parse.methods.get(name)
    head, formula = _docs(cls)
    found = _SOURCE.search(head)
    title, purpose = (
        (head[: found.start()], head[found.end() :]) if found else head.partition(": ")[::2]
    )
    edits = [edit for hook, edit in HOOKS.items() if _overrides(cls, hook)]
    return About(
        name=name,
        title=title.strip() or name,
        purpose=purpose.lstrip(" ,:").strip(),
        source=found[1] if found else "",
        formula=formula,
        example=_plain(cls.__doc__ or ""),
        edits=tuple(dict.fromkeys([GATE, *edits] if cls.needs_prompt else edits or [OF_PARTS])),
        merges=cls.affine,
        why_not=cls.why_not_affine,
        lr=cls.lr,
        weight_decay=cls.weight_decay,
        peft=cls.peft_type,
        options=_options(cls),
        first_values=_first_values(cls) if first_values else {},
    )


def presets() -> Mapping[str, str]:
    """Names that stand for a method with options."""
    return parse.PRESETS


def first_values_of(model: nn.Module, method: Method) -> dict[str, str]:
    """What each slot of a method starts from on a model (on the meta device, if you like)."""
    _, found = states(model, method)
    return {spec.name: described(spec.init) for specs in found.values() for spec in specs.values()}


def described(init: Init) -> str:
    """An initial value in words: the docstring of its function, and the numbers that were given to it."""
    if inspect.ismethod(init):
        return _words(inspect.getdoc(init) or init.__name__, {})
    if not inspect.isfunction(init):  # an object that is called
        return _words(inspect.getdoc(type(init)) or type(init).__name__, vars(init))
    maker = init.__globals__.get(init.__qualname__.partition(".")[0])
    text = inspect.getdoc(init)
    if text is None and inspect.isfunction(maker):  # a factory: its words, and what it was given
        text = inspect.getdoc(maker)
    if text is None:
        own = init.__name__.strip("<>")
        return "the method's own" + ("" if own == "lambda" else f" (`{own}`)")
    return _words(text, inspect.getclosurevars(init).nonlocals)


def _words(text: str, given: Mapping[str, Any]) -> str:
    """The first clause of a docstring, and numbers by name."""
    first = text.partition("\n")[0].partition(": ")[0].strip().rstrip(".")
    numbers = [f"{k} = {v:g}" for k, v in given.items() if isinstance(v, int | float)]
    return ", ".join([first, *numbers])


# -- reading a class ----------------------------------------------------------------------------------


def _docs(cls: type[Method]) -> tuple[str, str]:
    """(first paragraph of the module's docstring on one line, its formula)."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if not parts:
        return "", ""
    indented = [p for p in parts[1:] if all(line.startswith("    ") for line in p.splitlines())]
    written = indented or [part for part in parts[1:] if " = " in part]
    formula = inspect.cleandoc("\n" + written[0]) if written else ""
    return _plain(parts[0]), formula.replace("``", "`")


def _overrides(cls: type[Method], hook: str) -> bool:
    """Whether a class, or one between it and the contract, defines a hook."""
    return any(hook in vars(kind) for kind in cls.__mro__[: cls.__mro__.index(Method)])


def _options(cls: type[Method]) -> tuple[Option, ...]:
    """Its own fields, then those of every method."""
    names = sorted(cls.model_fields, key=lambda name: name in Method.model_fields)
    return tuple(_option(cls, name) for name in names)


def _option(cls: type[Method], name: str) -> Option:
    """A field; where a class gives it another default without a word, the words of the contract hold."""
    field, general = cls.model_fields[name], Method.model_fields.get(name)
    default = field.get_default(call_default_factory=True)
    shown = "required" if default is PydanticUndefined else _shown(default)
    text = field.description or (general.description if general is not None else None) or ""
    return Option(name, _kind(field.annotation), shown, _plain(text))


def _plain(text: str) -> str:
    """A docstring as one line, with code in single backticks."""
    return " ".join(text.split()).replace("``", "`")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return repr(list(value))
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _kind(annotation: Any) -> str:
    """An annotation as one would write it; what a literal may be. A field of any type holds a method."""
    if annotation is Any:
        return "method"
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(annotation)))
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text)


def _first_values(cls: type[Method]) -> dict[str, str]:
    """On a small decoder; empty for a method that must be told where it acts, or does not act on one."""
    somewhere: Mapping[str, Any] = {"targets": "mlp_down"}
    for options in ({}, somewhere):
        try:
            return first_values_of(_small_decoder(), cls.parse(options))
        except TrimtabError:
            continue
    return {}


@cache
def _small_decoder() -> nn.Module:
    """Two blocks of width 64, without weights."""
    from transformers import LlamaConfig

    from trimtab.models.skeleton import built

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=128, num_attention_heads=4, architectures=["LlamaForCausalLM"], **sizes
    )
    return built(config)
