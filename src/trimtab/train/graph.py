"""The graph of one forward, looked at before its backward: its nodes, and the tensors that they keep.

What a node keeps is read where it lies, as the hooks on saved tensors left it: what is made again keeps nothing, what
waits on the host lies there, and what is recomputed keeps its inputs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _CheckpointFrame

_SAVED = "_raw_saved_"
Node = Any
"""``torch.autograd.graph.Node``, with what its kinds have beside it."""


def nodes(root: Tensor) -> list[Node]:
    """All nodes that a backward from here runs."""
    found: dict[int, Node] = {}
    waiting: list[Node] = [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def accumulates(node: Node) -> bool:
    """Whether it adds to the gradient of a parameter."""
    return str(node.name()).endswith("AccumulateGrad")


def kept(node: Node) -> Iterator[Tensor]:
    """The tensors that a node keeps for its backward."""
    for saved in _saved(node):
        yield from _held(saved)
        for frame in _frames(saved.unpack_hook):
            for value in vars(frame).values():
                yield from _arguments(value)


def recomputed(node: Node) -> Iterator[_CheckpointFrame]:
    """The checkpoints that are computed again for a node; ``recompute_fn`` is what does so."""
    for saved in _saved(node):
        yield from _frames(saved.unpack_hook)


def storages(tensors: Iterable[Tensor]) -> dict[int, tuple[torch.device, int]]:
    """The storages of tensors by address, each with its device and bytes."""
    found = {}
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = tensor.device, storage.nbytes()
    return found


def _saved(node: Node) -> Iterator[Any]:
    """What a node keeps, as torch holds it."""
    for name in dir(node):
        if name.startswith(_SAVED):
            value = getattr(node, name)
            yield from value if isinstance(value, tuple | list) else (value,)


def _held(saved: Any) -> Iterator[Tensor]:
    """Of one saved tensor: itself, or what a hook put in its place."""
    packed = saved.data
    if isinstance(packed, Tensor):
        yield packed
    elif packed is not None:
        yield from _inside(packed)


def _inside(packed: object) -> Iterator[Tensor]:
    """The tensors that an object holds in its own attributes or places."""
    for value in gc.get_referents(packed):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (inner for inner in value.values() if isinstance(inner, Tensor))


def _frames(hook: Callable[..., Any] | None) -> Iterator[_CheckpointFrame]:
    """The checkpoint whose hook this is, if it is one's."""
    for cell in getattr(hook, "__closure__", None) or ():
        value = cell.cell_contents
        if isinstance(value, _CheckpointFrame):
            yield value
        elif callable(value):
            yield from _frames(value)


def _arguments(held: object) -> Iterator[Tensor]:
    """What a checkpoint keeps to compute its inside again: releases of torch have it in a list, or in a node."""
    if isinstance(held, list):
        for value in held:
            if isinstance(value, torch._C._autograd.SavedTensor):
                yield from _held(value)
    elif isinstance(held, Tensor) and held.grad_fn is not None:
        yield from kept(held.grad_fn)
