"""Where low-rank factors begin: functions from (weight, rank, what was observed) to factors.

An `Initialisation` is a frozen value with a name: ``"pissa"``, ``"pissa(niter=4)"``; each is one file in
`trimtab.inits`. One that begins ``away`` from zero would take its first product out of the base. The base is
immutable: the first factors are kept beside the trained ones instead, ΔW = s · (B A − B₀ A₀), which is zero at first.
One that begins ``beside`` another weight W' would put that in the place of W: ΔW = (W' − W) + s · B A, where W' − W is
found anew from the base whenever the adapter is attached.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.adapt.contract import Layer
from trimtab.adapt.observed import Observation, Observed, Original
from trimtab.config import Config, name_and_options
from trimtab.errors import AttachError, ConfigError, UnsupportedError
from trimtab.registry import Registry

DEFAULT = "default"
_NITER = re.compile(r"pissa_niter_(\d+)")
"""PEFT's way to write the number of iterations into the name."""
_SHARP = 64
"""So many iterations leave little to chance, and still cost far less than an exact decomposition."""


class Initialisation(Config, ABC):
    """First values of A_RI and B_OR of one weight W_OI (a group of a convolution, with its kernel in I)."""

    away: ClassVar[bool] = False
    """Whether B A is not zero at first, and is to be taken away again."""
    keeps_b: ClassVar[bool] = False
    """Whether B stays as it begins, and A alone is trained."""

    @property
    def beside(self) -> bool:
        """Whether the factors are meant beside another weight than the layer's; see `base`."""
        return False

    @property
    def done(self) -> bool:
        """Whether a plain file says all of an adapter that began so, on the base that it was attached to."""
        return False

    def to_peft(self) -> Mapping[str, Any]:
        """What PEFT's config says, where its reader has to begin so again."""
        return {}

    def told(self) -> str | None:
        """What the method's ``init`` becomes once something was observed; None leaves it."""
        return None

    def base(self, weight: Tensor, rank: int) -> Tensor:
        """W'_OI, the weight that is to stand in the place of W_OI."""
        return weight

    def observes(self, rank: int) -> Observation | None:
        """What must be seen of the layer first."""
        return None

    def ranks(
        self, ranks: Mapping[str, int], observed: Mapping[str, Sequence[Observed]]
    ) -> Mapping[str, int]:
        """The ranks that the sites are to have instead of these; one of 0 is left out."""
        return ranks

    @abstractmethod
    def factors(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        observed: Observed,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """(A_RI, B_OR). ``observed`` is what `observes` asked for; a gradient has the shape of the weight."""


inits: Registry[type[Initialisation]] = Registry(
    "initialisation",
    "trimtab.inits",
    {
        "corda": "trimtab.inits.corda:CorDA",
        "eva": "trimtab.inits.eva:EVA",
        "gaussian": "trimtab.inits.gaussian:Gaussian",
        "loftq": "trimtab.inits.loftq:LoftQ",
        "lora-ga": "trimtab.inits.lora_ga:LoRAGA",
        "mica": "trimtab.inits.mica:MiCA",
        "olora": "trimtab.inits.olora:OLoRA",
        "orthogonal": "trimtab.inits.orthogonal:Orthogonal",
        "pissa": "trimtab.inits.pissa:PiSSA",
    },
)
"""All of them but ``default``, which each method has of its own."""


@lru_cache
def initialisation(text: str) -> Initialisation | None:
    """The initialisation that a text names; None is the method's own.

    Raises:
        UnknownNameError, ConfigError: no such name or option.
    """
    if text == DEFAULT:
        return None
    text = _NITER.sub(r"pissa(niter=\1)", text)
    name, options = name_and_options(text, of="init")
    return inits.get(name.replace("_", "-")).parse(options, where=f"init {text}")


def again(config: Mapping[str, Any]) -> str:
    """The initialisation whose change of the base has to be made again for a LoRA of PEFT's to be what it was.

    Raises:
        UnsupportedError: only data can tell that change.
    """
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(("corda", "lora_ga")):
        raise UnsupportedError(
            f"this adapter was initialised by {init!r}, which changed its base as only data can tell; save it from "
            "PEFT in converted form (path_initial_model_for_weight_conversion), and load that."
        )
    if (found := _NITER.fullmatch(init)) is not None:
        warnings.warn(
            f"this adapter was initialised by {init!r}: random numbers decided what that took out of its base, and "
            "PEFT draws others each time it loads it. Here the base is decomposed nearly exactly. To have what was "
            "trained, save it from PEFT in converted form (path_initial_model_for_weight_conversion).",
            stacklevel=2,
        )
        return f"pissa(niter={max(int(found[1]), _SHARP)})"
    if init == "loftq":
        steps = config.get("loftq_config") or {}
        bits, iters = steps.get("loftq_bits", 4), steps.get("loftq_iter", 1)
        return f"loftq(bits={bits}, iters={iters}, scale='peft')"
    return init if init in ("pissa", "olora", "mica") else DEFAULT


class Start:
    """The first factors of one layer, computed once, when the first of them is asked for."""

    def __init__(self, init: Initialisation, layer: Layer, rank: int, scaling: float) -> None:
        self._init = init
        self._name = type(init).__name__
        self._layer = layer
        self._rank = rank
        self._scaling = scaling
        self._made: tuple[Tensor, Tensor] | None = None

    def a(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """First value of A."""
        return self._factors(generator)[0].clone()

    def b(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """First value of B."""
        return self._factors(generator)[1].clone()

    @torch.no_grad()
    def change(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """W' − W, where the initialisation is meant beside another weight."""
        groups = self._groups()
        weights = _grouped(self._layer.dense(), groups)
        changes = [self._init.base(one, self._rank // groups) - one for one in weights]
        return torch.cat(changes).reshape(shape).float().cpu()

    def _groups(self) -> int:
        shape_a, shape_b = self._layer.factor_shapes(self._rank)
        return shape_a[0] // shape_b[1]

    @torch.no_grad()
    def _factors(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self._made is None:
            asked = self._init.observes(self._rank)
            needed = asked is not None and not isinstance(asked, Original)
            if needed and not self._layer.observed:
                raise AttachError(
                    f"init {self._name} begins from data, and was told nothing of this layer: the method around it "
                    "does not hand on what it asks for."
                )
            shape_a, shape_b = self._layer.factor_shapes(self._rank)
            groups = self._groups()
            observed = {
                name: _grouped(value, groups)
                if name in ("gradient", "original")
                else [value] * groups
                for name, value in self._layer.observed.items()
            }
            pairs = [
                self._init.factors(
                    weight,
                    self._rank // groups,
                    self._scaling,
                    {name: values[number] for name, values in observed.items()},
                    generator,
                )
                for number, weight in enumerate(_grouped(self._layer.dense(), groups))
            ]
            a, b = (torch.stack(side).float().cpu() for side in zip(*pairs, strict=True))
            self._made = a.reshape(shape_a).contiguous(), b.reshape(shape_b).contiguous()
        return self._made


def _grouped(weight: Tensor, groups: int) -> list[Tensor]:
    """The weight as one matrix for each group, in fp32 or wider."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return list(wide.reshape(groups, weight.shape[0] // groups, -1))


def check_rank(weight: Tensor, rank: int, most: int, name: str) -> None:
    """Raise where a weight has fewer directions than an initialisation needs."""
    if rank > most:
        raise ConfigError(
            f"init {name} gives a weight of {weight.shape[0]} × {weight.shape[1]} a rank of at most {most}, not "
            f"{rank}; choose a smaller rank, or give this layer its own in rank_pattern."
        )
