"""QA-LoRA (Xu et al. 2023, arXiv 2309.14717): LoRA on means of groups of inputs, which a quantised layer can take in.

    y = W x + s · B A P x,   (P x)_g = n · mean of x over group g,   n = in / group

A_RN sees n numbers instead of ``in``, so the inputs of a group share one column of the change: where the weight is
quantised in the same groups, the change goes into their zero points. On dense weights it merges as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trimtab.adapt.contract import At, Layer, Params, Place, Spec
from trimtab.adapt.lowrank import BIASES
from trimtab.adapt.variant import Variant
from trimtab.errors import ConfigError
from trimtab.models.anatomy import Anatomy


@final
class QALoRA(Variant):
    """``QALoRA(rank=16, group=32)``; other fields as LoRA's."""

    kind: ClassVar[str] = "qalora"
    variant: ClassVar[str] = "use_qalora"
    offsets: ClassVar[bool] = False
    starts: ClassVar[Any] = "in its own way"
    linear_only: ClassVar[str] = "takes means over groups of inputs"

    group: int = Field(default=16, ge=1)
    """Inputs that share a column of A; it divides each layer's inputs."""

    def tensors(self, layer: Layer, role: str) -> dict[str, Spec]:
        specs = super().tensors(layer, role)
        if role in BIASES:
            return specs
        if layer.in_features % self.group:
            raise ConfigError(
                f"qalora: a layer of {layer.in_features} inputs has no whole number of groups of {self.group}; choose "
                "a group that divides it."
            )
        shape = (self.rank, layer.in_features // self.group)
        return {**specs, "A": replace(specs["A"], shape=shape)}

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        a = p["A"]
        return a.repeat_interleave(self.group, -1) * (a.shape[-1] / self.group), p[
            "B"
        ] * self.scaling

    def change(self, p: Params, x: Tensor, at: At) -> Tensor:
        groups = p["A"].shape[-1]
        pooled = x.unflatten(-1, (groups, self.group)).mean(-1) * groups
        return F.linear(F.linear(pooled, p["A"]), p["B"] * self.scaling)

    def in_peft(self, anatomy: Anatomy, places: Sequence[Place]) -> bool:
        """PEFT has it on layers of GPTQ, which hold a ``qweight``; elsewhere it passes over the option."""
        modules = [anatomy.layer(path).module for path in self.wrapped(places)]
        held = [{name for name, _ in (*m.named_parameters(), *m.named_buffers())} for m in modules]
        return super().in_peft(anatomy, places) and all("qweight" in names for names in held)

    def variant_to_peft(self) -> dict[str, Any]:
        return {"use_qalora": True, "qalora_group_size": self.group}

    @classmethod
    def fields_of_variant(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"group": config.get("qalora_group_size", 16)}
