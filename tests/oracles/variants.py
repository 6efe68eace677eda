"""Settings of the variants of PEFT's LoRA, each written once for PEFT and once for us."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

import trimtab as tt
from tests.oracles import kit
from tests.oracles.cases import Case

QV = ["q_proj", "v_proj"]
QVD = [*QV, "down_proj"]


def lora(targets: Any, **options: Any) -> LoraConfig:
    with kit.quiet():
        return LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **options})


OFFSET = [
    Case("offset", kit.bert, lora(["query", "dense"], lora_bias=True),
         tt.LoRA(rank=4, alpha=6, lora_bias=True, targets=("query", "dense"))),
    Case("offset-of-none", kit.llama, lora(QVD, lora_bias=True, use_rslora=True),
         tt.LoRA(rank=4, alpha=6, rslora=True, lora_bias=True, targets=tuple(QVD))),
    Case("offset-and-bias", kit.gpt2, lora(["c_attn", "c_proj"], lora_bias=True, bias="lora_only", fan_in_fan_out=True),
         tt.LoRA(rank=4, alpha=6, lora_bias=True, bias="lora_only", targets=("c_attn", "c_proj"))),
    Case("offset-convolutions", kit.convolutions, lora(["line", "square", "head"], lora_bias=True),
         tt.LoRA(rank=4, alpha=6, lora_bias=True, targets=("line", "square", "head"))),
]  # fmt: skip
VARIANTS = [*OFFSET]
