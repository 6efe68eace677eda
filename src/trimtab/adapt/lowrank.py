"""Low-rank factors, shared by the methods that are made of them.

    ΔW = s · B A,   A_RI, B_OR,   s = alpha / rank   (alpha / √rank for rsLoRA, arXiv 2312.03732)

A starts uniform in ±1/√in and B at zero, so that ΔW is zero; an embedding swaps the two, as loralib and
PEFT do (its A is looked up, and would never learn from a zero B that looks nothing up). ``init`` names another
start (`trimtab.adapt.initial`); where that is away from zero, the first factors are kept:

    ΔW = s · (B A − B₀ A₀) = s · [B, −B₀] [A; A₀],   the second being a plain LoRA of twice the rank, to share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from trimtab.adapt.contract import (
    At,
    Method,
    Observation,
    Observed,
    Params,
    Place,
    Spec,
    check_patterns,
    copy_of,
    exactly,
    pattern_value,
)
from trimtab.adapt.factors import CHANGE, FACTORS, KEPT, factor_specs, joined, plain_factors
from trimtab.adapt.initial import DEFAULT, Initialisation, again, initialisation
from trimtab.adapt.peft_config import refuse_unknown, selectors
from trimtab.errors import TargetError, UnsupportedError
from trimtab.frozen import Layer
from trimtab.models.anatomy import Anatomy

PEFT_DEFAULTS: Mapping[str, Any] = {
    "r": 8, "target_modules": None, "exclude_modules": None, "lora_alpha": 8, "lora_dropout": 0.0,
    "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "init_lora_weights": True,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    "megatron_config": None, "megatron_core": "megatron.core", "trainable_token_indices": None, "loftq_config": {},
    "eva_config": None, "corda_config": None, "lora_ga_config": None, "use_dora": False, "velora_config": None,
    "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16, "monteclora_config": None,
    "layer_replication": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip
"""Options of PEFT's LoRA and their defaults: one that is set otherwise and that we lack is an error."""

INNER, OWN = "bias-of-target", "bias"
BIASES = (INNER, OWN)
"""Roles of a site where a bias is trained: of a layer that has factors too, or of another."""


class LowRank(Method):
    """Fields and edits of LoRA; DoRA adds to it. Patterns map the end of a path to a rank or an alpha."""

    peft_type: ClassVar[str | None] = "LORA"
    disk: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "lora_A.weight",
        "lora_B.weight": "lora_B.weight",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_bias.inner": "base_layer.bias",
        "lora_bias.own": "bias",
    }
    short_names: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
        "lora_bias.inner": "bias", "lora_bias.own": "bias", CHANGE: "D", **KEPT,
    }  # fmt: skip

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The product is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of what enters A, in training."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Train biases too: those of the targets, or all."""
    init: str = DEFAULT
    """Where the factors begin: default, gaussian, orthogonal, pissa, olora, corda, lora-ga, eva or loftq."""
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    """End of a path -> its rank."""
    alpha_pattern: Mapping[str, float] = Field(default_factory=dict)
    """End of a path -> its alpha."""

    @field_validator("rank_pattern")
    @classmethod
    def _ranks(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        if any(rank < 1 for rank in value.values()):
            raise ValueError("every rank must be at least 1")
        return value

    @field_validator("init")
    @classmethod
    def _init(cls, value: str) -> str:
        initialisation(value)
        return value

    @property
    def scaling(self) -> float:
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def _start(self) -> Initialisation | None:
        return initialisation(self.init)

    @property
    def _away(self) -> bool:
        return self._start is not None and self._start.away

    @property
    def rebased(self) -> bool:
        """Whether the factors are meant beside another weight than the base's."""
        return self._start is not None and self._start.beside

    @property
    def fixed(self) -> frozenset[str]:
        return frozenset(KEPT) if self._away else frozenset()

    @property
    def rebuilt(self) -> frozenset[str]:
        # PEFT begins embeddings as usual, whatever it is told
        return frozenset(FACTORS[2:]) if self._away else frozenset()

    def observes(self, role: str) -> Observation | None:
        return None if self._start is None or role in BIASES else self._start.observes(self.rank)

    def informed(self, observed: Mapping[str, Sequence[Observed]]) -> Self:
        """Ranks where data want them, at the same scale everywhere; ranks that are given stay."""
        if self._start is not None and (told := self._start.told()) is not None:
            return self.replace(init=told)
        if self._start is None or self.rank_pattern:
            return self
        ranks = self._start.ranks({path: self.at(path).rank for path in observed}, observed)
        new, alphas = {}, {}
        for path, rank in ranks.items():
            method = self.at(path)
            if rank and rank != method.rank:
                pattern = exactly(path, ranks)
                new[pattern] = rank
                ratio = rank / method.rank
                alphas[pattern] = method.alpha * (ratio**0.5 if self.rslora else ratio)
        given = {key: a for key, a in self.alpha_pattern.items() if key not in alphas}
        method = self.replace(rank_pattern=new, alpha_pattern={**alphas, **given})
        kept = [Place(path) for path, rank in ranks.items() if rank]
        return method if len(kept) == len(ranks) else method.aimed(kept)

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        paths = anatomy.select(self.targets, self.exclude, self.layers)
        check_patterns(paths, self.rank_pattern, self.alpha_pattern)
        adapted = [Place(path) for path in paths]
        biased = self._biased(anatomy, set(paths))
        return [*adapted, *(Place(path, INNER if path in paths else OWN) for path in biased)]

    def at(self, path: str) -> Self:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank = pattern_value(self.rank_pattern, path, self.rank)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return self.replace(rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role in BIASES:
            bias = layer.bias()
            if bias is None:
                raise TargetError("a bias was asked for on a layer that has none.")
            slot = "lora_bias.inner" if role == INNER else "lora_bias.own"
            return {"bias": Spec(slot, tuple(bias.shape), copy_of(bias))}
        return factor_specs(layer, self.rank, self.scaling, self._start)

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.role in BIASES:
            return None
        given = x
        if self.dropout and at.training:
            if not x.is_floating_point():
                raise UnsupportedError(
                    "dropout before an embedding would drop token ids; set dropout=0 for it."
                )
            x = F.dropout(x, self.dropout)
        change = at.layer.lowrank(x, *self.factors(p))
        if "D" in p:
            change = change + at.layer.apply(given, p["D"])
        if "A0" not in p:
            return change
        # twice the same operation, and no longer product, so that it is exactly zero at first
        return change - at.layer.lowrank(given, p["A0"], p["B0"] * self.scaling)

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        if at.role not in BIASES:
            return y
        base = at.layer.bias()
        change = p["bias"] if base is None else p["bias"] - base.to(p["bias"].dtype)
        return y + at.layer.over_out(change)

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """The two factors whose product is ΔW."""
        return p["A"], p["B"] * self.scaling

    def whole(self, p: Params) -> tuple[Tensor, Tensor]:
        """The factors of the whole change, the first ones that are kept among them."""
        if self.rebased:
            raise UnsupportedError(
                f"{self.kind}: with init {self.init!r} the adapter computes beside a base in few bits, and what that "
                "is away from this base is of full rank: no low-rank factors are the whole change."
            )
        a, b = self.factors(p)
        if "A0" not in p:
            return a, b
        return joined([(a, b, self.rank), (p["A0"], p["B0"] * -self.scaling, self.rank)])

    @property
    def plain_rank(self) -> int:
        """The rank of `whole`."""
        return self.rank * (2 if self._away else 1)

    def product(self, p: Params, layer: Layer) -> Tensor:
        """ΔW in canonical orientation."""
        change = layer.product(*self.factors(p))
        if "D" in p:
            change = change + p["D"]
        return change - layer.product(p["A0"], p["B0"] * self.scaling) if "A0" in p else change

    def merged(self, p: Params, layer: Layer, role: str) -> tuple[Tensor, Tensor | None] | None:
        if role in BIASES:
            return layer.dense(), p["bias"]
        return layer.dense() + self.product(p, layer), layer.bias()

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        if role in BIASES:
            return super().scaled(p, weight, role)
        if self.rebased:
            self.whole(p)  # raises: what it adds to the base is made anew, and would not be scaled
        return {short: t * weight if short in ("B", "B0") else t for short, t in p.items()}

    def sum(
        self, parts: Sequence[tuple[Method, Params]], role: str
    ) -> tuple[Method, dict[str, Tensor]]:
        """Concatenation of ranks: exact, with every scaling folded into B."""
        if role in BIASES:
            return super().sum(parts, role)
        found = [(*m.whole(p), m.plain_rank) for m, p in parts if isinstance(m, LowRank)]
        a, b = joined(found)
        rank = sum(rank for _, _, rank in found)
        # Dropout acts on each x before its A; one shared dropout would act on all of them at once.
        changes = {"rank": rank, "alpha": float(rank), "rslora": False, "dropout": 0.0}
        return self.replace(init=DEFAULT, **changes), {"A": a, "B": b}

    @property
    def peft_reads(self) -> bool:
        return self.plain() in (self, self.replace(init=DEFAULT))

    def plain(self) -> Method:
        """Twice the rank, where the first factors are kept. The scale stays."""
        if not self._away:
            done = self._start is not None and self._start.done
            return self.replace(init=DEFAULT) if done else self
        factor = 2**0.5 if self.rslora else 2
        return self.replace(
            init=DEFAULT,
            rank=self.plain_rank,
            alpha=factor * self.alpha,
            rank_pattern={path: 2 * rank for path, rank in self.rank_pattern.items()},
            alpha_pattern={path: factor * alpha for path, alpha in self.alpha_pattern.items()},
        )

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        return plain_factors(tensors, self.rank)

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "bias": self.bias,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            **({} if self._start is None else self._start.to_peft()),
        }

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        layers = [anatomy.layer(p.path) for p in places] if self.rebased else []
        odd = [layer for layer in layers if layer.kind != "linear" or layer.transposed]
        return not odd and super().in_peft(anatomy, places)

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields of a PEFT LoRA config."""
        read = {
            "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern", "use_dora",
            "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
            "init_lora_weights", "lora_ga_config", "eva_config", "corda_config", "loftq_config",
        }  # fmt: skip
        refuse_unknown(config, PEFT_DEFAULTS, read, "LoRA")
        layers = config.get("layers_to_transform")
        return {
            "targets": selectors(config.get("target_modules")),
            "exclude": selectors(config.get("exclude_modules")),
            "layers": (layers,) if isinstance(layers, int) else layers,
            "rank": config.get("r", 8),
            "alpha": float(config.get("lora_alpha", 8)),
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": bool(config.get("use_rslora", False)),
            "bias": config.get("bias", "none"),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "init": again(config),
        }  # fmt: skip

    def roles_in_file(self, path: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        factors = [""] if any(not slot.startswith("lora_bias") for slot in slots) else []
        inner = [INNER] if "lora_bias.inner" in slots else []
        return (*factors, *inner, *([OWN] if "lora_bias.own" in slots else []))

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return [place.path for place in places if place.role not in BIASES]

    def _biased(self, anatomy: Anatomy, adapted: set[str]) -> list[str]:
        """Where biases are trained beside the factors: of the targets, or of all layers (as PEFT's)."""
        if self.bias == "none":
            return []
        if self.bias == "lora_only":
            return [path for path in anatomy.biased if path in adapted]
        whole = anatomy.select(self.train) if self.train else []
        inside = tuple(f"{path}." for path in whole)
        return [p for p in anatomy.biased if p not in whole and not p.startswith(inside)]
