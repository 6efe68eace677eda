"""Less memory for what training keeps until the backward: compute it again, or let it wait in host memory.

    recompute  mlp      of each block, what lies between the input of its MLP and the output is dropped and computed
                        again (gate, up and their product: most of what a block keeps, for little of its work)
               blocks   all of a block but its input is dropped and computed again
    activations host    what is kept is copied to host memory, and back when the backward asks for it

The gradients are the same, bit for bit where the operations are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from trimtab.adapt.bank import Bank, bank_of
from trimtab.adapt.checkpoint import Capturing
from trimtab.adapt.tree import anatomy_of, sites_of, walk
from trimtab.errors import UnsupportedError
from trimtab.optim.params import Memory

Recompute = Literal["none", "mlp", "blocks"]
_SWITCH = "gradient_checkpointing"
_INPUT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")
"""Where transformers keeps the hooks that make input embeddings require gradients."""
SMALL = 1 << 16
"""Tensors of fewer bytes stay: moving them costs more than they take."""


@contextmanager
def saving(model: nn.Module, memory: Memory) -> Iterator[None]:
    """A forward inside keeps what ``memory`` says."""
    away = offloaded(model) if memory.activations == "host" else nullcontext()
    with away, recomputed(model, memory.recompute):
        yield


def recomputed(model: nn.Module, what: Recompute) -> AbstractContextManager[None]:
    """Forwards of a model with adapters, inside, keep less for the backward.

    Raises:
        UnsupportedError: this architecture has no such parts.
    """
    if what == "mlp":
        return _again(mlps(model), bank_of(model))
    return _blocks(model) if what == "blocks" else nullcontext()


def mlps(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the MLPs (or experts) of a model, each as it is called.

    Raises:
        UnsupportedError: they are no modules of their own.
    """
    anatomy, wrapped = anatomy_of(model), sites_of(model)
    paths = dict.fromkeys(path.rpartition(".")[0] for path in anatomy.role("mlp_down"))
    found = [path for path in paths if path and path not in anatomy.blocks]
    inner = [p for p in anatomy.role("mlp") if p.rpartition(".")[0] in found]
    if not found or (len(inner) < 2 * len(found) and not anatomy.experts):
        raise UnsupportedError(
            f"the MLPs of {type(model).__name__} are no modules of their own, so they cannot be recomputed by "
            "themselves; recompute whole blocks instead (recompute: blocks)."
        )
    return [wrapped.get(path) or anatomy.modules[path] for path in found]


@contextmanager
def _again(modules: list[nn.Module], bank: Bank) -> Iterator[None]:
    """Each module's forward checkpointed, on the instance, and its own again at the end."""
    run = Capturing(partial(checkpoint, use_reentrant=False), bank)

    def through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return (
            run(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
        )

    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = partial(through, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


@contextmanager
def _blocks(model: nn.Module) -> Iterator[None]:
    """By transformers' own switch, which also keeps caches out of it."""
    switches = [module for module in walk(model) if hasattr(module, _SWITCH)]
    # releases differ in its name
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((name for name in names if hasattr(model, name)), None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedError(f"{type(model).__name__} cannot recompute its blocks.")
    before = [module.__dict__.get(_SWITCH) for module in switches]
    if not any(before):
        with _without_input_gradients(model):
            getattr(model, enable)({"use_reentrant": False})
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.__dict__.pop(_SWITCH, None)
            if value is not None:
                module.__dict__[_SWITCH] = value


@contextmanager
def _without_input_gradients(model: nn.Module) -> Iterator[None]:
    """The switch also lets input embeddings require gradients, which reentrant checkpointing needs: every block below
    the lowest site would then be computed again, and have a backward."""
    before = {name: model.__dict__.pop(name, None) for name in _INPUT_HOOKS}
    try:
        yield
    finally:
        model.disable_input_require_grads()  # type: ignore[operator]
        for name, hooks in before.items():
            model.__dict__.pop(name, None)
            if hooks is not None:
                model.__dict__[name] = hooks


class _Waiting:
    """A tensor in host memory, and where it came from."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        pinned = tensor.device.type == "cuda"
        self.host = torch.empty(
            tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device="cpu", pin_memory=pinned
        )
        self.host.copy_(tensor, non_blocking=pinned)

    def back(self) -> Tensor:
        return self.host.to(self.device, non_blocking=True)


def offloaded(model: nn.Module) -> saved_tensors_hooks:
    """Forwards inside keep their activations in host memory. Weights and buffers of the model stay where they are; so
    do small tensors."""
    held = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type != "meta"
    }
    seen: dict[int, tuple[ref[Tensor], int, _Waiting]] = {}

    def pack(tensor: Tensor) -> Tensor | _Waiting:
        if tensor.nbytes < SMALL or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if tensor.untyped_storage().data_ptr() in held:
            return tensor
        known = seen.get(id(tensor))  # one input that several layers keep goes over once
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        waiting = _Waiting(tensor)
        seen[id(tensor)] = ref(tensor), tensor._version, waiting
        return waiting

    def unpack(packed: Tensor | _Waiting) -> Tensor:
        return packed.back() if isinstance(packed, _Waiting) else packed

    return saved_tensors_hooks(pack, unpack)
