"""Optimisers for LoRA by the names of ``peft.optimizers``: LoRA+ as parameter groups, LoRA-FA as steps, and
Riemannian preconditioning before the steps of any other.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
from transformers.trainer_pt_utils import get_parameter_names

from trimtab.adapt.adapter import TensorName
from trimtab.adapt.bank import bank_of
from trimtab.adapt.contract import Place
from trimtab.adapt.factors import EMBEDDED, FACTORS
from trimtab.adapt.lowrank import BIASES, LowRank
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.methods.lora import LoRA
from trimtab.peft.errors import PeftWarning
from trimtab.peft.find import root_of, tuner_of

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """LoRA+ (arXiv 2402.12354): B learns ``loraplus_lr_ratio`` times as fast as A.

    Args:
        model: with LoRAs; what is trained is grouped as PEFT groups it.
        optimizer_cls: any optimiser that takes groups.
        lr: the rate of A and of what else is a matrix.
        loraplus_lr_ratio: the rate of B and of vectors, by ``lr``.
        loraplus_weight_decay: of matrices.
        loraplus_lr_embedding: the rate of both factors of embeddings.
        kwargs: further options of the optimiser.

    Raises:
        ConfigError: nothing of a LoRA is trained, so there is no B.
    """
    root = root_of(model)
    embeddings = {
        id(tensor)
        for adapter in bank_of(root).adapters.values()
        for name, tensor in adapter.named().items()
        if name.slot in EMBEDDED
    }
    decaying = {n for n in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in n}
    groups: dict[str, list[nn.Parameter]] = {"a": [], "embedding": [], "b": [], "vectors": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            groups["embedding"].append(parameter)
        elif "lora_B" in name or parameter.dim() == 1:
            groups["b" if name in decaying else "vectors"].append(parameter)
        else:
            groups["a"].append(parameter)
    if not groups["embedding"] and not any(
        "lora_B" in n for n, p in model.named_parameters() if p.requires_grad
    ):
        raise ConfigError("no LoRA of this model is trained, so LoRA+ has no B to speed up.")
    rates = {
        "a": lr,
        "embedding": loraplus_lr_embedding,
        "b": lr * loraplus_lr_ratio,
        "vectors": lr * loraplus_lr_ratio,
    }
    optimizer: Any = optimizer_cls
    made: Optimizer = optimizer(
        [
            {
                "params": members,
                "weight_decay": 0.0 if key == "vectors" else loraplus_weight_decay,
                "lr": rates[key],
            }
            for key, members in groups.items()
        ],
        lr=lr,
        **kwargs,
    )
    return made


class LoraFAOptimizer(Optimizer):
    """AdamW (decay after the step) on the factors that learn, with the gradient of the nearest change of W:

        g_B ← g_B (A Aᵀ + 1e-8)⁻¹ / s²   (LoRA-FA, arXiv 2308.03303)

    Its one group has the trained parameters and, in the same order, their ``names``. ``pairs`` maps a name to the
    place, the factors and the method of its layer.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        pairs: Mapping[str, tuple[Place, Mapping[str, nn.Parameter], LoRA]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"lr={lr} and eps={eps} must not be negative, betas={betas} in 0 to 1 (without it)."
            )
        group = {
            "params": list(named.values()),
            "names": list(named),
            "scaling_factors": [pairs[n][2].scaling if n in pairs else None for n in named],
        }
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__([group], defaults)
        self._pairs = dict(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for place, factors, method in self._pairs.values():
            method.before_step({place: factors})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        gradient = parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        rate = group["lr"]
        if group["correct_bias"]:
            count = state["step"]
            rate = rate * math.sqrt(1 - beta2**count) / (1 - beta1**count)
        parameter.addcdiv_(
            state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate
        )
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """LoRA-FA (arXiv 2308.03303): freeze the factors that start at random, and train the others by projected steps.

    Of an embedding that is A, which starts at zero; PEFT trains its B, which learns nothing from a zero A.

    Args:
        model: with LoRAs. The scaling of each layer is its own, as in PEFT.
        r, lora_alpha, use_rslora: what the active adapters are configured with; a difference is a warning (of
            ``use_rslora``, an error), because the adapters' own values hold.
        lr: learning rate.
        weight_decay: after each step, of all that is trained.

    Raises:
        ConfigError: no LoRA is active, or ``use_rslora`` is not the adapters'.
        UnsupportedError: an active adapter is not a LoRA alone.
    """
    root = root_of(model)
    tuner = tuner_of(model)
    bank = bank_of(root)
    active = (
        [n for n in bank.active if n not in bank.disabled]
        if tuner is None
        else tuner.active_adapters
    )
    _compare(model, active, r, lora_alpha, use_rslora)
    pairs: dict[str, tuple[Place, Mapping[str, nn.Parameter], LoRA]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in active:
        adapter = bank.require(name)
        tensors = adapter.named()
        for site in adapter.sites:
            method = adapter.methods[site.method].at(site.path)
            if site.role in BIASES or site.method >= len(adapter.method.members):
                continue
            if not isinstance(method, LoRA) or method.plain() != method:
                raise UnsupportedError(
                    f"adapter {name!r} ({method.kind}) is not a plain LoRA, so LoRA-FA has no factor to freeze in it."
                )
            factors = {
                short: tensors[key]
                for slots in (FACTORS, EMBEDDED)
                for short, slot in zip(("A", "B"), slots, strict=False)
                if (key := TensorName(site.path, slot)) in tensors
            }
            frozen, learner = (
                ("B", "A") if TensorName(site.path, EMBEDDED[0]) in tensors else ("A", "B")
            )
            factors[frozen].requires_grad_(False)
            scaled = LoRA(rank=method.rank, alpha=method.scaling * method.rank, frozen_a=True)
            pairs[names[id(factors[learner])]] = Place(site.path), factors, scaled  # type: ignore[assignment]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not pairs:
        raise ConfigError("no LoRA of this model is active, so LoRA-FA has nothing to train.")
    return LoraFAOptimizer(
        named, {n: pairs[n] for n in named if n in pairs}, lr, weight_decay=weight_decay
    )


def _compare(
    model: nn.Module, active: list[str], r: int, alpha: float, rslora: bool | None
) -> None:
    """What was said of the adapters against what they are."""
    methods = {name: bank_of(root_of(model)).require(name).method for name in active}
    for name, method in methods.items():
        if not isinstance(method, LowRank):
            continue
        if rslora is not None and rslora != method.rslora:
            raise ConfigError(
                f"use_rslora={rslora}, and adapter {name!r} has {method.rslora}; leave it out: the adapter's holds."
            )
        if (r, alpha) != (method.rank, method.alpha) and not (
            method.rank_pattern or method.alpha_pattern
        ):
            warnings.warn(
                f"r={r} and lora_alpha={alpha} are not those of adapter {name!r} ({method.rank} and {method.alpha:g}), "
                "which hold.",
                category=PeftWarning,
                stacklevel=3,
            )


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """An optimiser whose steps see the gradients of LoRA's factors preconditioned (arXiv 2402.02347):

        g_A ← (Bᵀ B + reg I)⁻¹ g_A,   g_B ← g_B (A Aᵀ + reg I)⁻¹

    Only pairs of matrices that are both trained are; factors of embeddings, convolutions and experts are not.

    Raises:
        ConfigError: there is no such pair.
        UnsupportedError: at a step with a closure, which would make gradients anew after this.
    """
    pairs = [
        (a, b)
        for adapter in bank_of(root_of(model)).adapters.values()
        for name, a in adapter.named().items()
        if name.slot == FACTORS[0]
        and (b := adapter.named()[TensorName(name.path, FACTORS[1])]).dim() == a.dim() == 2
        and a.requires_grad
        and b.requires_grad
    ]
    if not pairs:
        raise ConfigError("no LoRA of this model is trained in both of its factors.")

    @torch.no_grad()
    def precondition(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise UnsupportedError(
                "a step with a closure makes gradients anew, after they were preconditioned; call backward yourself, "
                "then step()."
            )
        for a, b in pairs:
            of_a, of_b = _inverse(b.mT @ b, reg), _inverse(a @ a.mT, reg)
            if a.grad is not None:
                a.grad.copy_(of_a @ a.grad.to(of_a.dtype))
            if b.grad is not None:
                b.grad.copy_(b.grad.to(of_b.dtype) @ of_b)

    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = optimizer_cls
    made: Optimizer = optimizer(learnt, lr=lr, **kwargs)
    made.register_step_pre_hook(precondition)
    return made


def _inverse(gram: Tensor, reg: float) -> Tensor:
    """Of a small symmetric matrix with ``reg`` added to its diagonal, in fp32 or wider."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.pinv(wide + reg * eye, hermitian=True)
