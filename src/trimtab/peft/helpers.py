"""Small helpers by the names of ``peft.helpers``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any, Literal

import torch
from torch import nn

from trimtab.adapt.acting import scale
from trimtab.adapt.bank import bank_of
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, FileFormatError
from trimtab.peft.find import root_of
from trimtab.peft.hub import local_file
from trimtab.peft.model import PeftModel
from trimtab.peft.tuner import Tuner


class MontecloraTrainerMixin:
    """Before a ``Trainer`` among the bases of a class: adds MonteCLoRA's own loss to that of the task."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As the trainer's; see `Tuner._get_monteclora_loss`."""
        trainer: Any = super()
        loss, out = trainer.compute_loss(model, inputs, return_outputs=True, **kwargs)
        tuners = [module for module in model.modules() if isinstance(module, Tuner)]
        for tuner in tuners:
            loss = loss + tuner._get_monteclora_loss() / len(tuners)
        return (loss, out) if return_outputs else loss


# -- signatures ---------------------------------------------------------------------------------------


def update_forward_signature(model: PeftModel) -> None:
    """Let ``model.forward`` show the arguments of the model inside, for tools that look at them."""
    _show(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Let ``model.generate`` show the arguments of the model inside."""
    if hasattr(type(model.get_base_model()), "generate"):
        _show(model, "generate")


def update_signature(
    model: PeftModel, method: Literal["forward", "generate", "all"] = "all"
) -> None:
    """Both, or one of them."""
    if method not in ("forward", "generate", "all"):
        raise ConfigError(f"method is 'forward', 'generate' or 'all', not {method!r}.")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show(model: PeftModel, name: str) -> None:
    own = inspect.unwrap(getattr(type(model), name))
    inner = getattr(type(model.get_base_model()), name)

    @functools.wraps(inner, assigned=("__doc__", "__name__", "__annotations__"))
    def shown(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    model.__dict__[name] = MethodType(shown, model)


# -- files --------------------------------------------------------------------------------------------


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether a folder or a repository holds an adapter, of whatever method.

    Raises:
        StorageError: the hub could not be asked (PEFT says False then).
    """
    try:
        local_file(model_name_or_path, "adapter_config.json")
    except FileFormatError:
        return False
    return True


# -- acting -------------------------------------------------------------------------------------------


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """All adapters go ``multiplier`` times as far inside the ``with``, whatever their method; 0 is the base.

    Weights that were merged in place are dropped, because they have the scale of before; what the model computes
    afterwards is the same.

    Raises:
        AttachError: the model has no adapters.
        ConfigError: the multiplier is not a finite number.
        TargetError: an adapter puts virtual tokens before the text, which have no scaled form.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise ConfigError(f"multiplier must be a number, not {multiplier!r}.")
    root = root_of(model)
    bank = bank_of(root)
    before = dict(bank.scales)
    try:
        for name in bank.adapters:
            scale(root, name, before.get(name, 1.0) * multiplier)
        yield
    finally:
        for name in bank.adapters:
            if bank.scales.get(name, 1.0) != before.get(name, 1.0):
                scale(root, name, before.get(name, 1.0))
        bank.scales = {n: s for n, s in bank.scales.items() if n in before or s != 1.0}


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Nothing changes inside the ``with``: adapters here compute in the dtype of their layer's input already.

    PEFT's layers cast their input to the dtype of the adapter, which this turns off there.
    """
    yield


class DoraCaching:
    """PEFT's switch of a cache for DoRA. Here norms are always kept until a tensor changes, where no gradients are
    taken; so that turning it on or off changes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing."""

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled


# -- choosing targets ---------------------------------------------------------------------------------


@torch.no_grad()
def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The linear layers, and the expert parameters, whose weights have the smallest condition numbers κ = s_1 / s_n.

    Args:
        model: with or without adapters; only its own weights are looked at.
        top_p: the share of them that is chosen, at least one.
        max_dim_size_to_analyze: layers with a longer side are left out.
        moe_param_suffixes: ends of the names of expert parameters; by default all are looked at.
        show_progress: show how far it is.

    Returns:
        ``target_modules`` and ``target_parameters`` (None without experts), for ``LoraConfig``.
    """
    from rich.progress import track

    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is a share, above 0 and at most 1, not {top_p!r}.")
    anatomy = anatomy_of(root_of(model))
    linear = [
        path
        for path, module in anatomy.modules.items()
        if isinstance(module, nn.Linear) or type(module).__name__.startswith("Linear")
    ]
    experts = [
        path
        for path in anatomy.experts
        if moe_param_suffixes is None or path.endswith(tuple(moe_param_suffixes))
    ]
    kappas: dict[str, float] = {}
    for path in track([*linear, *experts], "Condition numbers", disable=not show_progress):
        layers = anatomy.expert_layers(path) if path in experts else [anatomy.layer(path)]
        if max(layers[0].shape) <= max_dim_size_to_analyze:
            found = [torch.linalg.svdvals(layer.wide(layer.dense())) for layer in layers]
            kappas[path] = sum(float(s[0] / (s[-1] + 1e-8)) for s in found) / len(found)

    def best(paths: Sequence[str]) -> list[str]:
        ordered = sorted((path for path in paths if path in kappas), key=kappas.__getitem__)
        return ordered[: max(1, int(len(ordered) * top_p))] if ordered else []

    return {"target_modules": best(linear), "target_parameters": best(experts) or None}
