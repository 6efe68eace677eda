"""Where adapter tensors live in the module tree, named as PEFT names them.

A slot ``lora_A.weight`` of adapter ``support`` is the parameter ``lora_A.support.weight`` below its
site; a slot without a dot, ``ia3_l``, is ``ia3_l.support``. Slots are plain modules, so optimisers,
``state_dict``, ``.to()`` and FSDP see ordinary parameters.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from trimtab.errors import AttachError


class Slot(nn.Module):
    """A node of the slot tree. Its forward is never called."""


_VALID = re.compile(r"[A-Za-z0-9_\-]+")


def check_name(name: str) -> None:
    """An adapter name becomes a segment of parameter names; refuse what cannot be one."""
    if not _VALID.fullmatch(name):
        raise AttachError(
            f"adapter name {name!r}: use letters, digits, '_' and '-' only (it becomes part of keys)."
        )
    if name in dir(Slot()):
        raise AttachError(
            f"adapter name {name!r} is an attribute of every torch module and cannot name a parameter; "
            f"choose another, for example '{name}-adapter'."
        )


def split(slot: str) -> tuple[str, str]:
    """``lora_A.weight`` -> (``lora_A``, ``weight``); ``ia3_l`` -> (``ia3_l``, ``""``)."""
    head, dot, tail = slot.rpartition(".")
    return (head, tail) if dot else (slot, "")


def add(root: nn.Module, slot: str, adapter: str, tensor: Tensor) -> None:
    """Register a tensor as the parameter of a slot below ``root``."""
    head, tail = split(slot)
    node = root
    for segment in [*head.split("."), *([adapter] if tail else [])]:
        if segment not in node._modules:
            node.add_module(segment, Slot())
        node = node.get_submodule(segment)
    node.register_parameter(
        tail or adapter, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    )


def get(root: nn.Module, slot: str, adapter: str) -> nn.Parameter:
    """The parameter as it is now (FSDP and ``.to()`` may have replaced the object)."""
    head, tail = split(slot)
    node = root
    for segment in head.split("."):
        node = node._modules[segment]  # type: ignore[assignment]
    if tail:
        node = node._modules[adapter]  # type: ignore[assignment]
    parameter = node._parameters[tail or adapter]
    if parameter is None:
        raise AssertionError(f"slot {slot} of {adapter} is empty")
    return parameter


def remove(root: nn.Module, slot: str, adapter: str) -> None:
    """Drop the parameter of a slot."""
    head, tail = split(slot)
    node = root.get_submodule(".".join([head, adapter] if tail else [head]))
    del node._parameters[tail or adapter]


def prune(root: nn.Module) -> None:
    """Drop the slot modules below ``root`` that hold nothing any more."""
    for name, child in list(root._modules.items()):
        if isinstance(child, Slot):
            prune(child)
            if not child._modules and not child._parameters:
                del root._modules[name]


def memory_name(slot: str, adapter: str) -> str:
    """``lora_A.weight`` -> ``lora_A.support.weight``."""
    head, tail = split(slot)
    return f"{head}.{adapter}.{tail}" if tail else f"{slot}.{adapter}"
