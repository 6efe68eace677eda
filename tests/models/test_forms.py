"""Which modules are recognised by their code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from trimtab.models.forms import Gated, Norm, Plain, form_of


def test_families() -> None:
    for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm):
        assert form_of(kind) == Norm("variance_epsilon", "before")
    assert form_of(Olmo2RMSNorm) == Norm("variance_epsilon", "after")
    assert form_of(GemmaRMSNorm) == Norm("eps", "offset")
    for gated in (LlamaMLP, MistralMLP, Qwen3MLP):
        assert form_of(gated) == Gated("gate_proj", "up_proj", "act_fn", "down_proj")
    assert form_of(Phi3MLP) == Gated("", "gate_up_proj", "activation_fn", "down_proj")
    assert form_of(CLIPMLP) == Plain("fc1", "activation_fn", "fc2")


class Renamed(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        """Other names and comments say the same."""
        projected = self.down_proj(self.act_fn(self.gate_proj(given)) * self.up_proj(given))
        return projected


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)


class Swapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class More(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Sharper(GemmaRMSNorm):
    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + self.eps)


def test_only_the_same_code_counts() -> None:
    assert form_of(Renamed) == Gated("gate_proj", "up_proj", "act_fn", "down_proj")
    for other in (Scaled, Swapped, More, Sharper, T5LayerNorm, nn.Linear, nn.LayerNorm, nn.Module):
        assert form_of(other) is None, other
    made = type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")})
    assert form_of(made) is None, "no source"
