"""Run torch without values: shapes, dtypes and lifetimes are real, numbers are not, and no memory is taken.

Inside `Hollow`, tensors of floats lie on the meta device. Integers and booleans that do not come from floats (token
ids, positions, masks, indices) are few and small, and a program asks about them; they are real, on the CPU, whatever
device they were meant for. What is read of a tensor without values is ones: a loss is then finite and a norm is not
clipped. Attention is the fused one, whose memory grows with the length and not with its square; elsewhere torch
would choose by device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
META = torch.device("meta")
CPU = torch.device("cpu")
MOST = 1 << 22
"""Elements that a real tensor of integers may have."""

Seen = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None]
"""Called with each operation: the function, its arguments, and what came out."""


class Hollow(TorchDispatchMode):
    """Operations on tensors without values; ``seen`` is told of each."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        self._above = _Above()
        self._known: dict[Any, _Shape] = {}

    def __enter__(self) -> Hollow:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._above.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._above.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._current_autograd_node() is not None:
            self._above.stay()
        out = self._run(func, args, kwargs or {})
        self._seen(func, args, kwargs or {}, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [*_tensors(args), *_tensors(kwargs)]
        empty = [tensor for tensor in given if tensor.is_meta]
        if func is aten._to_copy.default:
            return _moved(args[0], kwargs)
        if not given:
            return _made(func, args, kwargs)
        if not empty:
            return _counted(func, args, kwargs, given)
        if func is aten._local_scalar_dense.default:
            kind = empty[0].dtype
            return kind == torch.bool or torch.zeros((), dtype=kind).item()
        if func is aten.equal.default:
            return True
        if func._schema.is_mutable and isinstance(args[0], Tensor) and not args[0].is_meta:
            return args[0]  # values that nobody has are written into a real tensor
        if func is aten.nonzero.default:
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        if func is aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in _places(index)])
        if func is aten.topk.default:
            return _balanced(func(*args, **kwargs), args[0].shape[-1])
        return self._shaped(func, args, kwargs)

    def _shaped(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What torch says of shapes; asked once for each operation on such arguments."""
        if _looks(func):
            return func(*_emptied(args), **_emptied(kwargs))
        key = (func, _sign(args), _sign(kwargs))
        known = self._known.get(key)
        if known is None:
            out = func(*_emptied(args), **_emptied(kwargs))
            if isinstance(out, Tensor) and out.is_meta and out._is_view() is False:
                self._known[key] = _Shape(out.shape, out.stride(), out.dtype)
            return out
        return torch.empty_strided(known.shape, known.stride, dtype=known.dtype, device=META)


class _Shape(NamedTuple):
    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype


def _sign(value: Any) -> Any:
    """What of an argument the shape of a result may depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_sign, value))
    if isinstance(value, dict):
        return tuple((name, _sign(inner)) for name, inner in value.items())
    return type(value), value


def _moved(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A copy of another dtype or on another device."""
    wanted = kwargs.get("device")
    dtype = kwargs.get("dtype") or source.dtype
    if source.is_meta:
        if wanted is not None and torch.device(wanted).type != "meta":
            return torch.ones(source.shape, dtype=dtype)
        return aten._to_copy.default(source, **kwargs)
    if wanted is not None and not dtype.is_floating_point:
        kwargs = {**kwargs, "device": CPU}
    return aten._to_copy.default(source, **kwargs)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A new tensor out of nothing."""
    wanted = kwargs.get("device")
    if wanted is None or torch.device(wanted).type != "meta":
        return func(*args, **kwargs)
    out = func(*args, **kwargs)
    if isinstance(out, Tensor) and not out.is_floating_point() and out.numel() <= MOST:
        return func(*args, **{**kwargs, "device": CPU})
    return out


def _counted(func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
    """An operation on real tensors; without values where its result would be large."""
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == "meta":
        dtype = kwargs.get("dtype") or given[0].dtype
        kwargs = kwargs if dtype.is_floating_point else {**kwargs, "device": CPU}
    if sum(tensor.numel() for tensor in given) > 1024:
        try:
            shaped = func(*_emptied(args), **_emptied(kwargs))
        except (NotImplementedError, RuntimeError):  # its shape depends on values
            return func(*args, **kwargs)
        if max((tensor.numel() for tensor in _tensors(shaped)), default=0) > MOST:
            return shaped
    return func(*args, **kwargs)


def _emptied(value: Any) -> Any:
    """Arguments of an operation without the values of their tensors; a number may be a tensor, and stays."""
    if isinstance(value, Tensor):
        if value.is_meta or value.dim() == 0:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    if isinstance(value, list | tuple):
        return [_emptied(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _emptied(inner) for name, inner in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or the results of an operation: an operation knows lists, and names at the top.

    (Torch's own walk over any tree takes more time than all else that is done for an operation here.)
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@cache
def _looks(func: Any) -> bool:
    """Whether what an operation gives may lie in what it was given."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A condition that holds everywhere as the indices of all places."""
    if index is None or index.dtype != torch.bool or not index.is_meta:
        return [index]
    return [*torch.ones(index.shape, dtype=torch.bool).nonzero().unbind(1)]


def _balanced(out: Any, count: int) -> Any:
    """The best of scores that nobody knows: each as often as any other, as a router of experts should."""
    values, indices = out
    return values, (torch.arange(indices.numel()) % count).view(indices.shape)


class _Above(TorchFunctionMode):
    """What must be caught before torch divides it into operations: attention, and tensors of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = False

    def stay(self) -> None:
        """Be there in backward too, which begins without modes of this kind and computes checkpointed blocks again."""
        if not self._inside and torch._C._len_torch_function_stack() == 0:
            torch._C._push_on_torch_function_stack(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return func(*args, **kwargs)  # type: ignore[no-untyped-call]
        before, self._inside = self._inside, True
        try:
            if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
                return _attention(*args, **kwargs)
            if func is torch.tensor and kwargs.get("device") is not None:
                made = func(*args, **{**kwargs, "device": None})
                return made.to(kwargs["device"])
            return func(*args, **kwargs)
        finally:
            self._inside = before


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=META)
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out
