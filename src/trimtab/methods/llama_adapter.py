"""LLaMA-Adapter (Zhang et al. 2023, arXiv 2303.16199): prompts beside the attention of the upper layers.

    y = softmax(q Kᵀ) V + g · softmax(q (W_k A)ᵀ) W_v A,   g = tanh(γ) per head,   γ starts at 0

A are trained prompts of each layer, read through the layer's own frozen projections of keys and values; they take
no position. The gates are closed at first, so that it starts as the identity, exactly. PEFT has one gate per layer,
without tanh: ``gate="scalar"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, final

import torch
from pydantic import Field
from torch import Tensor

from trimtab.adapt.attention import ROLE
from trimtab.adapt.contract import At, Layer, Method, Params, Place, Spec, normal, zeros
from trimtab.adapt.peft_config import refuse_unknown
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy
from trimtab.models.attention_layer import AttentionLayer

_READ = {"adapter_len", "adapter_layers", "target_modules"}


@final
class LlamaAdapter(Method):
    """``LlamaAdapter(length=10, top=30)``: prompts of that length in the ``top`` last attentions."""

    kind: ClassVar[str] = "llama-adapter"
    affine: ClassVar[bool] = False
    why_not_affine: ClassVar[str] = "it adds a softmax of its own beside that of attention"
    lr: ClassVar[float] = 9e-3
    weight_decay: ClassVar[float] = 0.02
    peft_type: ClassVar[str | None] = "ADAPTION_PROMPT"
    disk: ClassVar[Mapping[str, str]] = {
        "adaption_prompt": "adaption_prompt",
        "adaption_gate": "adaption_gate",
    }
    short_names: ClassVar[Mapping[str, str]] = {
        "adaption_prompt": "prompt",
        "adaption_gate": "gate",
    }

    targets: str | tuple[str, ...] = "self_attention"
    length: int = Field(default=10, ge=1)
    """How many prompts each attention has."""
    top: int = Field(default=30, ge=1)
    """In how many of the last attentions."""
    gate: Literal["heads", "scalar"] = "heads"
    """A gate per head, or one per layer as PEFT has it."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        return [Place(place.path, ROLE) for place in super().place(anatomy)][-self.top :]

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        if not isinstance(layer, AttentionLayer) or not layer.projections:
            raise UnsupportedError(
                "LLaMA-Adapter reads its prompts through an attention's own projections of keys and values, and those "
                "are not known here."
            )
        width = layer.projections[0].in_features
        gates = layer.heads if self.gate == "heads" else 1
        return {
            "prompt": Spec("adaption_prompt", (1, self.length, width), normal(1.0)),
            "gate": Spec("adaption_gate", (gates,), zeros),
        }

    def beside(self, p: Params, at: At) -> tuple[Tensor, Tensor, Tensor] | None:
        keys, values = cast(AttentionLayer, at.layer).project(p["prompt"][0])
        return keys, values, torch.tanh(p["gate"]) if self.gate == "heads" else p["gate"]

    def wrapped(self, places: Sequence[Place]) -> list[str]:
        return []

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT knows two families more or less; its GPT-2 adds the prompt's part behind the output projection."""
        upper = anatomy.role("self_attention")[-len(places) :]
        return (
            self.gate == "scalar"
            and anatomy.model_type in ("llama", "mistral")
            and [place.path for place in places] == upper
        )

    def to_peft(self, places: Sequence[Place]) -> dict[str, Any]:
        return {
            "adapter_len": self.length,
            "adapter_layers": len(places),
            "target_modules": places[0].path.rpartition(".")[2],
        }

    @classmethod
    def from_peft(
        cls, config: Mapping[str, Any], slots: Mapping[str, tuple[int, ...]]
    ) -> LlamaAdapter | None:
        refuse_unknown(config, {}, _READ, "LLaMA-Adapter")
        if config.get("target_modules") == "attn":
            raise UnsupportedError(
                "PEFT's LLaMA-Adapter on GPT-2 leaves out the output projection, which is another function than the "
                "paper's; train it anew with Trimtab."
            )
        length, top = config["adapter_len"], config["adapter_layers"]
        return cls(length=length, top=top, gate="scalar")

    def roles_in_file(self, path: str, slots: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        return (ROLE,)
