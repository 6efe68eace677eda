"""Chosen token embeddings (no paper): train the rows of a few tokens (new ones, say) and leave the rest of the table.

    E'[t] = row_t  for t in ``ids``,   else E[t];   rows start as copies

On an output head it is the same rows of its weight: ``targets=("embed_tokens", "lm_head")`` trains both, apart from
each other; ``tie`` lets them be one, where the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, copy_of
from trimtab.adapt.in_peft import TIED
from trimtab.adapt.peft_config import read_options
from trimtab.adapt.tied import with_tied
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.models.anatomy import Anatomy


@final
class Tokens(Method):
    """``Tokens(ids=(50257, 50258))``."""

    kind: ClassVar[str] = "tokens"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "TRAINABLE_TOKENS"
    peft_kinds: ClassVar[tuple[str, ...]] = ("embedding", "linear")
    peft_options: ClassVar[Mapping[str, tuple[str, Any]]] = {"token_indices": ("ids", ())}
    disk: ClassVar[Mapping[str, str]] = {"trainable_tokens_delta": "trainable_tokens_delta"}
    short_names: ClassVar[Mapping[str, str]] = {"trainable_tokens_delta": "rows"}
    instead_of: ClassVar[tuple[str, ...]] = ("weight",)

    targets: str | tuple[str, ...] = "input_embedding"
    ids: tuple[int, ...] = Field(default=(0,), min_length=1)
    """The tokens whose rows are trained."""
    tie: bool = False
    """Let a head that is tied to the embedding have the same rows."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        places = super().place(anatomy)
        return with_tied(anatomy, places) if self.tie else places

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if role == TIED:
            return {}
        if layer.kind not in ("embedding", "linear"):
            raise UnsupportedError("tokens: only an embedding or a head has a row for each token.")
        weight = layer.dense() if layer.kind == "linear" else layer.dense().T
        wrong = [token for token in self.ids if not 0 <= token < weight.shape[0]]
        if wrong or len(set(self.ids)) < len(self.ids):
            raise ConfigError(
                f"tokens: ids must be distinct and below {weight.shape[0]}, the rows of this layer; "
                f"not {wrong or self.ids}."
            )
        rows = weight.detach()[list(self.ids)]
        return {"rows": Spec("trainable_tokens_delta", tuple(rows.shape), copy_of(rows))}

    def delta(self, p: Params, x: Tensor, at: At) -> Tensor | None:
        ids = torch.tensor(self.ids, device=x.device)
        if at.layer.kind == "linear":
            change = F.linear(x, p["rows"] - at.layer.dense()[ids].to(x.dtype))
            return change.new_zeros(*x.shape[:-1], at.layer.out_features).index_add(-1, ids, change)
        change = p["rows"] - at.layer.dense().T[ids].to(p["rows"].dtype)
        chosen = (x[..., None] == ids).to(change.dtype)
        return at.layer.rescaled(chosen @ change)

    def in_peft(self, anatomy: Anatomy, places: Any) -> bool:
        apart = not self.tie and any(anatomy.tied(place.path) for place in places)  # in PEFT not
        return not apart and super().in_peft(anatomy, places)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]) -> Method:
        return cls(**read_options(config, cls.peft_options, cls.peft_lacks, cls.kind), tie=True)
