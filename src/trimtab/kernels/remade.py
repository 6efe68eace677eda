"""Tensors that a graph does not keep, because they are cheaply made again from others that it keeps anyway.

Inside `remaking`, what was announced by `remade` is left out wherever an operation keeps it for backward (as it is, or
as a view): the graph keeps the recipe. The value comes back bit for bit, because the same function makes it of the same
tensors; a function whose result depends on anything else must not be announced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Recipe:
    """How a tensor is made; shared by all that keep it, so that it is made once for all that want it at a time."""

    def __init__(self, tensor: Tensor, make: Callable[..., Tensor], given: tuple[Any, ...]) -> None:
        self._version, self._dtype = tensor._version, tensor.dtype
        self._make = make
        self._given = tuple(v.detach() if isinstance(v, Tensor) else v for v in given)
        self._versions = self._now()
        self._wanted = 0
        self._device = tensor.device
        self._made: tuple[int, Tensor] | None = None

    def _now(self) -> list[int]:
        return [value._version for value in self._given if isinstance(value, Tensor)]

    def gives(self, tensor: Tensor) -> bool:
        """Whether it still makes this tensor, or one that this is a view of."""
        same = (tensor._version, tensor.dtype) == (self._version, self._dtype)
        return same and self._now() == self._versions

    def want(self) -> None:
        self._wanted += 1

    @torch.no_grad()
    def make(self) -> Tensor:
        if self._now() != self._versions:
            raise RuntimeError(
                "a tensor that is needed for backward was changed in place after a frozen norm or MLP had used it."
            )
        stream = _stream(self._device)
        before, known = self._made or (None, None)
        made = known if known is not None and before == stream else self._make(*self._given)
        self._wanted -= 1
        self._made = (stream, made) if self._wanted > 0 else None
        return made


def _stream(device: torch.device) -> int:
    """Where a tensor is made now; what one stream of CUDA makes is not there yet for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_announced: ContextVar[dict[StorageWeakRef, Recipe] | None] = ContextVar("_announced", default=None)


def remade(tensor: Tensor, make: Callable[..., Tensor], *given: Any) -> Tensor:
    """``tensor`` itself, which is ``make(*given)``; inside `remaking`, that is remembered."""
    known = _announced.get()
    if known is not None:
        for gone in [storage for storage in known if storage.expired()]:
            del known[gone]
        known[StorageWeakRef(tensor.untyped_storage())] = Recipe(tensor, make, given)
    return tensor


@contextmanager
def remaking() -> Iterator[None]:
    """Graphs that are made inside keep no tensor that is announced by `remade`."""
    known: dict[StorageWeakRef, Recipe] = {}

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return _Kept(tensor)  # its values may lie in no storage
        recipe = known.get(StorageWeakRef(tensor.untyped_storage()))
        if recipe is None or not recipe.gives(tensor):
            return _Kept(tensor)
        return _Remade(recipe, tensor)

    before = _announced.set(known)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed()):
            yield
    finally:
        _announced.reset(before)


class _Kept:
    """A tensor that is kept as it is. (With hooks, torch itself no longer sees whether it was changed.)"""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # What an operation gives and keeps itself would hold the operation, which holds it: a graph that no backward
        # goes through would never be freed. torch knows the operation without it.
        self._tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self._version = tensor._version

    def __call__(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self._tensor.shape)}."
            )
        return self._tensor


class _Remade:
    """A tensor, or a view of one, that will be made again."""

    __slots__ = ("_recipe", "_view")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        recipe.want()
        self._recipe = recipe
        self._view = tensor.size(), tensor.stride(), tensor.storage_offset()

    def __call__(self) -> Tensor:
        return self._recipe.make().as_strided(*self._view)
