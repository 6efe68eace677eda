"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values before those of every attention.

    K' = [P_K ; K],   V' = [P_V ; V]

The prefix has no queries, and its keys take no position of their own (they are as rotated already); real
tokens come after it. One flat table holds all layers, (length, 2 · layers · key heads · head width), as PEFT
stores it. With ``hidden`` the table is made in training from a small one, P = W_2 tanh(W_1 E + b_1) + b_2;
what is shared is the table. P-tuning v2 (arXiv 2110.07602) is the preset ``p-tuning-v2``: flat, with dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.adapt.attention import ROLE
from trimtab.adapt.contract import At, Method, Params, Place, Spec, normal
from trimtab.adapt.encoder import TABLE, mlp, mlp_specs, table
from trimtab.adapt.peft_config import refuse_unknown
from trimtab.adapt.reading import read
from trimtab.errors import UnsupportedError
from trimtab.kernels.dropout import drawn_dropout
from trimtab.models.anatomy import Anatomy

_READ = {
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "init_weights", "encoder_hidden_size", "prefix_projection",
}  # fmt: skip
_DECODER = r"re:(.*\.)?decoder\..*(SelfAttention|self_attn)"


@final
class Prefix(Method):
    """``Prefix(length=30)``; ``hidden=512`` trains it through an MLP, ``text=ids`` starts it as those tokens.

    ``targets=("self_attention", "cross_attention")`` puts one into the cross-attention of an encoder-decoder too.
    ``init_std`` is the spread of the first values where there is no text; dropout is per row.
    """

    kind: ClassVar[str] = "prefix"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = (
        "it adds keys and values to the softmax of attention, which no weight can do"
    )
    lr: ClassVar[float] = 5e-3
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    peft_root: ClassVar[str] = "base_model."
    disk: ClassVar[Mapping[str, str]] = {TABLE: "prompt_embeddings"}

    targets: str | tuple[str, ...] = "self_attention"
    length: int = Field(default=30, ge=1)
    """How many virtual tokens each attention has."""
    init_std: float = Field(default=0.02, ge=0.0)
    """Spread of the first values, where there is no text."""
    hidden: int | None = Field(default=None, ge=1)
    """Width of an MLP that makes the table in training; none trains the table itself."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of the prefix, in training, row by row."""
    text: tuple[int, ...] = ()
    """Token ids whose keys and values are the first values."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.hidden and self.text:
            raise ValueError(
                "an MLP has no weights that give the keys of a text; leave out one of hidden, text"
            )
        return self

    @property
    def virtual_tokens(self) -> int:
        return self.length

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        return [Place(place.path, ROLE) for place in super().place(anatomy)]

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        heads, width = anatomy.key_heads
        narrow, size = heads * width, 2 * len(places) * heads * width
        if self.hidden is None:
            init = read(anatomy, self.text, places) if self.text else normal(self.init_std)
            return table((self.length, size), init)
        first = table((self.length, narrow), normal(1.0))
        return first | mlp_specs("transform", (narrow, self.hidden, size))

    def ready(self, shared: Params, training: bool) -> Params:
        return {TABLE: mlp(shared, "transform", shared[TABLE], torch.tanh)}

    def keys_values(self, p: Params, at: At) -> tuple[Tensor, Tensor] | None:
        mine = at.shared[TABLE].unflatten(1, (at.count, 2, -1))[:, at.index].to(at.dtype)
        if at.training and self.dropout:
            one, draw = mine, at.generator(mine.device)
            mine = at.per_unit(
                lambda count: drawn_dropout(one.expand(count, -1, -1, -1), self.dropout, draw)
            )
        keys, values = mine.unbind(-2)
        return keys, values

    def plain(self) -> Prefix:
        return self.replace(hidden=None)

    def plain_tensors(
        self, tensors: Mapping[str, Tensor], place: Place | None
    ) -> dict[str, Tensor]:
        return dict(self.ready(tensors, training=False))

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return []

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        return not anatomy.encoder_decoder  # PEFT's ties the layers of a decoder; see below

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.length, "num_layers": len(places)}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Prefix | None:
        refuse_unknown(config, {}, _READ, "prefix tuning")
        if "prompt_embeddings" not in slots:
            raise UnsupportedError(
                "this prefix adapter has no 'prompt_embeddings'; save it again with PEFT ≥ 0.10."
            )
        length = slots["prompt_embeddings"][0]
        return cls(length=length, targets=_DECODER) if _doubled(config) else cls(length=length)

    @classmethod
    def tensor_from_peft(cls, config: Mapping[str, Any], slot: str, tensor: Tensor) -> Tensor:
        """In an encoder-decoder, layer l of PEFT's decoder takes the table's entry 2l (mod layers)."""
        if slot != TABLE or not _doubled(config):
            return tensor
        layers = config["num_layers"]
        taken = [2 * layer % layers for layer in range(layers)]
        return tensor.unflatten(1, (layers, -1))[:, taken].flatten(1)


def _doubled(config: Mapping[str, Any]) -> bool:
    return config.get("num_transformer_submodules") == 2
