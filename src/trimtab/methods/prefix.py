"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values before those of every attention.

    K' = [P_K ; K],   V' = [P_V ; V]

The prefix has no queries, and its keys take no position of their own (they are as rotated already); real
tokens come after it. One flat table holds all layers, (length, 2 · layers · key heads · head width), as PEFT
stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from pydantic import Field
from torch import Tensor

from trimtab.adapt.attention import ROLE
from trimtab.adapt.contract import At, Method, Params, Place, Spec, normal
from trimtab.adapt.peft_config import refuse_unknown
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy

_PEFT_DEFAULTS = {
    "num_virtual_tokens": None, "token_dim": None, "num_transformer_submodules": None, "num_attention_heads": None,
    "num_layers": None, "init_weights": None, "encoder_hidden_size": None, "prefix_projection": False,
}  # fmt: skip


@final
class Prefix(Method):
    """``Prefix(length=30)``; ``init_std`` is the spread of the first values."""

    kind: ClassVar[str] = "prefix"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = (
        "it adds keys and values to the softmax of attention, which no weight can do"
    )
    lr: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    peft_root: ClassVar[str] = "base_model."
    disk: ClassVar[Mapping[str, str]] = {"prompt_encoder.embedding.weight": "prompt_embeddings"}

    targets: str | tuple[str, ...] = "self_attention"
    length: int = Field(default=30, ge=1)
    init_std: float = Field(default=0.02, ge=0.0)

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        return [Place(place.path, ROLE) for place in super().place(anatomy)]

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        heads, width = anatomy.key_heads
        shape = (self.length, 2 * len(places) * heads * width)
        return {"table": Spec("prompt_encoder.embedding.weight", shape, normal(self.init_std))}

    def keys_values(self, p: Params, at: At) -> tuple[Tensor, Tensor] | None:
        table = at.shared["table"].view(
            self.length, -1, 2, at.shared["table"].shape[1] // (2 * at.count)
        )
        keys_TC, values_TC = table[:, at.index].unbind(1)
        return keys_TC, values_TC

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return []

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        return (
            not anatomy.encoder_decoder
        )  # PEFT's has none in the encoder, and one in cross-attention

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.length,
            "num_layers": len(places),
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Prefix | None:
        refuse_unknown(config, _PEFT_DEFAULTS, set(_PEFT_DEFAULTS), "prefix tuning")
        if "prompt_embeddings" not in slots:
            raise UnsupportedError(
                "this prefix adapter has no 'prompt_embeddings'; save it again with PEFT ≥ 0.10."
            )
        return cls(length=slots["prompt_embeddings"][0])
