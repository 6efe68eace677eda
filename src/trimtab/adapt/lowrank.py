"""Low-rank factors, shared by the methods that are made of them.

    ΔW = s · B A,   A_RI, B_OR,   s = alpha / rank   (alpha / √rank for rsLoRA, arXiv 2312.03732)

A starts uniform in ±1/√in and B at zero, so that ΔW is zero; an embedding swaps the two, as loralib and
PEFT do (its A is looked up, and would never learn from a zero B that looks nothing up). ``init`` names another
start (`trimtab.adapt.initial`); where that is away from zero, the first factors are kept:

    ΔW = s · (B A − B₀ A₀) = s · [B, −B₀] [A; A₀],   the second being a plain LoRA of twice the rank, to share

With ``lora_bias`` B has a bias of its own, c, which starts at zero:   y = W x + s · (B A x + c)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from trimtab.adapt.biases import BIASES as BIASES
from trimtab.adapt.biases import DISK as BIASES_ON_DISK
from trimtab.adapt.biases import INNER as INNER
from trimtab.adapt.biases import SLOTS, bias_roles, bias_spec, biased, with_bias
from trimtab.adapt.contract import (
    At,
    Method,
    Observation,
    Observed,
    Params,
    Place,
    Spec,
    check_patterns,
    exactly,
    pattern_value,
    zeros,
)
from trimtab.adapt.factors import (
    CHANGE,
    EMBEDDED,
    FACTORS,
    KEPT,
    OFFSET,
    factor_specs,
    joined,
    plain_factors,
)
from trimtab.adapt.initial import DEFAULT, Initialisation, initialisation
from trimtab.adapt.lowrank_in_peft import VARIANTS, fields_of, options_of
from trimtab.adapt.weight import dropped
from trimtab.errors import TargetError, UnsupportedError
from trimtab.frozen import Layer
from trimtab.frozen.multihead import OUTPUT, PARAMETER
from trimtab.kernels.lowrank import Change
from trimtab.models.anatomy import Anatomy
from trimtab.models.repeat import repeated

ENDS = (PARAMETER, OUTPUT)


class LowRank(Method):
    """Fields and edits of LoRA; its variants add to it. Patterns map the end of a path to a rank or an alpha.

    ``variant`` is the option of PEFT's that makes its LoRA this method, ``peft_own`` others that it alone has;
    ``offsets`` whether B may have a bias, ``halves`` whether one factor may stay as it begins; ``fuses`` whether what
    is added is just the product of the factors.
    """

    variant: ClassVar[str] = ""
    peft_own: ClassVar[tuple[str, ...]] = ()
    offsets: ClassVar[bool] = True
    halves: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "LORA"
    disk: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "lora_A.weight",
        "lora_B.weight": "lora_B.weight",
        OFFSET: OFFSET,
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        **BIASES_ON_DISK,
    }
    short_names: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
        OFFSET: "c", **dict.fromkeys(SLOTS.values(), "bias"), CHANGE: "D", **KEPT,
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
    lora_bias: bool = False
    """Train a bias of B, which is scaled as the product is."""
    init: str = DEFAULT
    """Where the factors begin: default, gaussian, orthogonal, pissa, olora, mica, corda, lora-ga, eva or loftq."""
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

    @model_validator(mode="after")
    def _offset(self) -> Self:
        if self.lora_bias and not self.offsets:
            raise ValueError(
                f"{self.kind} has no lora_bias; bias='lora_only' trains the layers' own"
            )
        if self._start is not None and self._start.keeps_b and not self.halves:
            raise ValueError(
                f"{self.kind} trains both factors, so it does not begin as {self.init}"
            )
        return self

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
        own = (
            {FACTORS[1], EMBEDDED[1]} if self._start is not None and self._start.keeps_b else set()
        )
        return frozenset({*own, *KEPT} if self._away else own)

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
        ranks = {path: self.at(path).rank for path in observed}
        return self.ranked(self._start.ranks(ranks, observed))

    def ranked(self, ranks: Mapping[str, int]) -> Self:
        """The method with these ranks by path, at the scales that it has; a rank of 0 leaves a place out."""
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
        chosen = anatomy.select(self.targets, self.exclude, self.layers)
        paths = anatomy.projections(chosen)
        if self.bias != "none" and any(path in anatomy.opened for path in paths):
            raise UnsupportedError(
                "bias: nn.MultiheadAttention holds the bias of its projections in a parameter of its own, which "
                "is not trained; leave bias at 'none'."
            )
        everything = list(dict.fromkeys([*chosen, *paths]))
        check_patterns(everything, self.rank_pattern, self.alpha_pattern)
        if self.opening([path for path in chosen if path not in paths]) != self:
            raise TargetError(
                "a pattern names an nn.MultiheadAttention; name its projections, in_proj_weight and out_proj."
            )
        adapted = [Place(path) for path in paths]
        if self.bias == "none":
            return adapted
        every = self.bias == "all"
        return [*adapted, *biased(anatomy, every=every, adapted=paths, train=self.train)]

    def opening(self, attentions: Iterable[str]) -> Self:
        """The method with what its patterns say of each ``nn.MultiheadAttention`` said of its projections."""
        found = {}
        for field in ("rank_pattern", "alpha_pattern"):
            given = dict(self)[field]
            said = {path: pattern_value(given, path, None) for path in attentions}
            each = {f"{p}.{end}": v for p, v in said.items() if v is not None for end in ENDS}
            found[field] = given if each.items() <= given.items() else {**each, **given}
        return self.replace(**found)

    def at(self, path: str) -> Self:
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        rank = pattern_value(self.rank_pattern, path, self.rank)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return self.replace(rank=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role in BIASES:
            return {"bias": bias_spec(layer, role)}
        specs = factor_specs(layer, self.rank, self.scaling, self._start)
        if not self.lora_bias:
            return specs
        if layer.kind == "embedding":
            raise TargetError("lora_bias: an embedding has no bias; leave it out of the targets.")
        return {**specs, "c": Spec(OFFSET, (layer.out_features,), zeros)}

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        if at.role in BIASES:
            return None
        change = self.change(p, dropped(x, self.dropout, at), at)
        if "c" in p:
            change = change + at.layer.over_out(p["c"] * self.scaling)
        if "D" in p:
            change = change + at.layer.apply(x, p["D"])
        if "A0" not in p:
            return change
        # twice the same operation, and no longer product, so that it is exactly zero at first
        return change - at.layer.lowrank(x, p["A0"], p["B0"] * self.scaling)

    def lowrank(self, p: Params, at: At) -> Change | None:
        if not self.fuses or at.role in BIASES or not {"c", "D", "A0"}.isdisjoint(p):
            return None
        share = self.dropout if at.training else 0.0
        draw = partial(at.generator, p["A"].device)
        return Change(p["A"], p["B"], self.scaling, share, draw)

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        """s · B A x, of an x that dropout has seen."""
        return at.layer.lowrank(x, *self.factors(p))

    def leave(self, p: Params, y: Tensor, at: At) -> Tensor:
        return with_bias(p["bias"], y, at) if at.role in BIASES else y

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
        return layer.dense() + self.product(p, layer), self._moved(p, layer.bias())

    def _moved(self, p: Params, bias: Tensor | None) -> Tensor | None:
        """A layer's bias, with that of B."""
        offset = self.offset(p)
        return bias if offset is None else offset if bias is None else bias + offset

    def offset(self, p: Params) -> Tensor | None:
        """s · c, where B has a bias."""
        return p["c"] * self.scaling if "c" in p else None

    def scaled(self, p: Params, weight: float, role: str) -> dict[str, Tensor]:
        if role in BIASES:
            return super().scaled(p, weight, role)
        if self.rebased:
            self.whole(p)  # raises: what it adds to the base is made anew, and would not be scaled
        return {short: t * weight if short in ("B", "B0", "c") else t for short, t in p.items()}

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
        offsets = [c for m, p in parts if isinstance(m, LowRank) and (c := m.offset(p)) is not None]
        summed = self.summed(init=DEFAULT, lora_bias=bool(offsets), **changes)
        return summed, {"A": a, "B": b} | ({"c": torch.stack(offsets).sum(0)} if offsets else {})

    def summed(self, **changes: Any) -> Method:
        """The method of a sum, from that of one of its parts."""
        return self.replace(**changes)

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
        return options_of(self, places)

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        # PEFT would change the weight that repeated blocks share once for each of them
        alone = not self.rebased or repeated(anatomy.modules.values()) is None
        return alone and super().in_peft(anatomy, [p for p in places if p.role not in BIASES])

    def peft_differs(self, layer: Layer) -> str:
        if self.rebased and (layer.kind != "linear" or layer.transposed):
            return "it begins LoftQ otherwise here than at a linear layer"
        return super().peft_differs(layer)

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Self | None:
        chosen = [name for name in VARIANTS if config.get(name)]
        if len(chosen) > 1:
            raise UnsupportedError(
                f"{' and '.join(chosen)} are two methods in one; PEFT has no such LoRA either. Leave one of them out."
            )
        if chosen != [name for name in [cls.variant] if name]:
            return None
        return cls(**cls.fields_from_peft(config), **cls.fields_of_variant(config))

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields of the options that are of this method alone."""
        return {}

    @classmethod
    def fields_from_peft(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields of a PEFT LoRA config."""
        return fields_of(config, {cls.variant, *cls.peft_own})

    def roles_in_file(self, path: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        factors = [""] if slots.keys() - set(SLOTS.values()) else []
        return (*factors, *bias_roles(slots))

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return [place.path for place in places if place.role not in BIASES]
