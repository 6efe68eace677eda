"""Where adapter tensors live in the module tree, named as PEFT names them.

A slot ``lora_A.weight`` of adapter ``support`` is the parameter ``lora_A.support.weight`` below its
site; a slot without a dot, ``ia3_l``, is ``ia3_l.support``; ``prompt_encoder.embedding.weight`` is
``prompt_encoder.support.embedding.weight``. Slots are plain modules, so optimisers,
``state_dict``, ``.to()`` and FSDP see ordinary parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Self

from torch import Tensor, nn

from trimtab.errors import AttachError


class _Mode:
    """Whether the slots below one place are in training mode: one answer for all of them."""

    __slots__ = ("training",)

    def __init__(self, training: bool) -> None:
        self.training = training


class Slot(nn.Module):
    """A node of the slot tree. Its forward is never called.

    It is read like a ``ModuleDict`` or ``ParameterDict``: ``site.lora_A["default"].weight``, ``site.ia3_l["default"]``.
    Slots below a slot share its mode, so that ``train()`` stops at the topmost: there may be thousands below it.

    Args:
        around: the module that it is put into.
    """

    def __init__(self, around: nn.Module | None = None) -> None:
        training = around is None or around.training
        self.__dict__["_mode"] = around._mode if isinstance(around, Slot) else _Mode(training)
        super().__init__()
        self.training = training

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return bool(self.__dict__["_mode"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_mode"].training = mode

    def train(self, mode: bool = True) -> Self:
        """As of any module; those below it follow by themselves."""
        self.training = mode
        return self

    def __getitem__(self, name: str) -> nn.Module | Tensor:
        return self._held[name]

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def keys(self) -> Iterable[str]:
        return self._held.keys()

    def values(self) -> Iterable[nn.Module | Tensor]:
        return self._held.values()

    def items(self) -> Iterable[tuple[str, nn.Module | Tensor]]:
        return self._held.items()

    @property
    def _held(self) -> dict[str, nn.Module | Tensor]:
        parts: tuple[dict[str, Any], ...] = (self._modules, self._parameters, self._buffers)
        return {name: part for held in parts for name, part in held.items() if part is not None}


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


WHOLE = frozenset({"prompt_encoder"})
"""First segments after which an adapter's name stands: what PEFT keeps as a module of its own for each adapter."""


def place(slot: str, adapter: str) -> tuple[list[str], str]:
    """(the nodes down to a tensor, its name there): ``lora_A.weight`` is ``weight`` in ``lora_A.support``."""
    *head, tail = slot.split(".")
    if not head:
        return [slot], adapter
    at = 1 if head[0] in WHOLE else len(head)
    return [*head[:at], adapter, *head[at:]], tail


def add(root: nn.Module, slot: str, adapter: str, tensor: Tensor, *, stored: bool = True) -> None:
    """Register a tensor at a slot below ``root``: a parameter as such, any other as a buffer.

    A buffer that is not ``stored`` stays out of state dicts.
    """
    nodes, name = place(slot, adapter)
    node = nested(root, ".".join(nodes))
    if isinstance(tensor, nn.Parameter):
        node.register_parameter(name, tensor)
    else:
        node.register_buffer(name, tensor, persistent=stored)


def nested(root: nn.Module, path: str) -> nn.Module:
    """The node at a path below ``root``, made where there is none."""
    node = root
    for segment in path.split("."):
        if segment not in node._modules:
            node.add_module(segment, Slot(node))
        node = node.get_submodule(segment)
    return node


def get(root: nn.Module, slot: str, adapter: str) -> Tensor:
    """The tensor as it is now (FSDP and ``.to()`` may have replaced the object)."""
    nodes, name = place(slot, adapter)
    node = root
    for segment in nodes:
        node = node._modules[segment]  # type: ignore[assignment]
    tensor = node._parameters[name] if name in node._parameters else node._buffers[name]
    if tensor is None:
        raise AssertionError(f"slot {slot} of {adapter} is empty")
    return tensor


def remove(root: nn.Module, slot: str, adapter: str) -> None:
    """Drop the tensor of a slot."""
    nodes, name = place(slot, adapter)
    delattr(root.get_submodule(".".join(nodes)), name)


def withdraw(root: nn.Module, slot: str, adapter: str) -> None:
    """Drop the tensor of a slot, and the nodes that hold nothing then."""
    remove(root, slot, adapter)
    tidy(root, ".".join(place(slot, adapter)[0]))


def tidy(root: nn.Module, path: str) -> None:
    """Drop the slots along a path below ``root`` that hold nothing any more, from its end upwards."""
    nodes = [root]
    for segment in path.split("."):
        child = nodes[-1]._modules.get(segment)
        if child is None:
            break
        nodes.append(child)
    names = path.split(".")[: len(nodes) - 1]
    for around, segment, node in zip(nodes[-2::-1], names[::-1], nodes[:0:-1], strict=True):
        if not _empty(node):
            return
        del around._modules[segment]


def _empty(node: nn.Module) -> bool:
    """Whether it is a slot that holds nothing."""
    return (
        isinstance(node, Slot) and not node._modules and not node._parameters and not node._buffers
    )


def stored(root: nn.Module) -> dict[str, Tensor]:
    """What a state dict holds of the slots below ``root``: their parameters and stored buffers, by name."""
    found = {}
    for path, node in root.named_modules():
        if isinstance(node, Slot):
            for name, tensor in [*node._parameters.items(), *node._buffers.items()]:
                if tensor is not None and name not in node._non_persistent_buffers_set:
                    found[f"{path}.{name}"] = tensor
    return found


def prune(root: nn.Module) -> None:
    """Drop all slots below ``root`` that hold nothing: what an attachment that failed may have left."""
    for name, child in list(root._modules.items()):
        if isinstance(child, Slot):
            prune(child)
            if _empty(child):
                del root._modules[name]


def memory_name(slot: str, adapter: str) -> str:
    """``lora_A.weight`` -> ``lora_A.support.weight``."""
    nodes, name = place(slot, adapter)
    return ".".join([*nodes, name])
