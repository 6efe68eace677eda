"""Prompt tuning (Lester, Al-Rfou & Constant 2021, arXiv 2104.08691): trained input embeddings before the text.

    h_0 = [P ; E[x]]

In a decoder the prompt is read first, once for all rows, and the text finds its keys and values in each
attention, as if the prompt's tokens were there. In an encoder the rows grow by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from trimtab.adapt.contract import Init, Place, Spec, normal
from trimtab.adapt.encoder import TABLE, table
from trimtab.adapt.peft_config import refuse_unknown
from trimtab.adapt.prompted import Prompted
from trimtab.adapt.reading import embedded, input_embedding, sampled
from trimtab.models.anatomy import Anatomy

_READ = {
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "num_transformer_submodules",
}  # fmt: skip


@final
class Prompt(Prompted):
    """``Prompt(length=20)``; ``text=ids`` starts it as those tokens, repeated or cut to its length.

    Without a text, ``init`` draws its tokens from the vocabulary, or its values from N(0, 1) or U(−½, ½).
    """

    kind: ClassVar[str] = "prompt"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    disk: ClassVar[Mapping[str, str]] = {TABLE: "prompt_embeddings"}

    init: Literal["vocabulary", "normal", "uniform"] = "vocabulary"
    """First values without a text: drawn tokens, N(0, 1) or U(−½, ½)."""
    text: tuple[int, ...] = ()
    """Token ids whose embeddings are the first values."""

    def shared(self, anatomy: Anatomy, places: Sequence[Place]) -> dict[str, Spec]:
        return table((self.length, input_embedding(anatomy)[1].out_features), self._first(anatomy))

    def _first(self, anatomy: Anatomy) -> Init:
        if self.text:
            return embedded(anatomy, self.text)
        return {"vocabulary": sampled(anatomy), "normal": normal(1.0), "uniform": _half}[self.init]

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.length, "num_transformer_submodules": 1}

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> Prompt | None:
        refuse_unknown(config, {}, _READ, "prompt tuning")
        return cls(length=config["num_virtual_tokens"])

    @classmethod
    def tensor_from_peft(cls, config: Mapping[str, Any], slot: str, tensor: Tensor) -> Tensor:
        """For an encoder-decoder PEFT writes as many rows again, which it never uses."""
        return tensor[: config["num_virtual_tokens"]].clone() if slot == TABLE else tensor


def _half(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) - 0.5
