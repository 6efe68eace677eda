"""Settings of the variants of PEFT's LoRA, each written once for PEFT and once for us."""

from __future__ import annotations

from typing import Any

from peft import BdLoraConfig, KasaConfig, LoraConfig, VeloraConfig

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
KASA = [
    Case("kasa", kit.llama, lora(QVD, kasa_config=KasaConfig()), tt.KaSA(rank=4, alpha=6, targets=tuple(QVD)),
         fp32=True),
    Case("kasa-patterns", kit.bert, lora(["query", "dense"], kasa_config=KasaConfig(beta=0.1, gamma=0.0),
         lora_bias=True, use_rslora=True, rank_pattern={"query": 3}, alpha_pattern={"dense": 3}),
         tt.KaSA(rank=4, alpha=6, beta=0.1, gamma=0.0, rslora=True, lora_bias=True, rank_pattern={"query": 3},
                 alpha_pattern={"dense": 3}, targets=("query", "dense")), fp32=True),
    Case("kasa-bias-all", kit.bert, lora(["query", "dense"], kasa_config=KasaConfig(), bias="all"),
         tt.KaSA(rank=4, alpha=6, bias="all", targets=("query", "dense")), fp32=True),
]  # fmt: skip
BLOCKS = [
    Case("bdlora", kit.llama,
         lora(QVD, use_bdlora=BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["q_", "v_"], nblocks=4)),
         tt.BDLoRA(rank=4, alpha=6, blocks=4, block_a=("down",), block_b=("q_", "v_"), targets=tuple(QVD))),
    Case("bdlora-some", kit.llama,
         lora(QVD, use_bdlora=BdLoraConfig(target_modules_bd_a=["v_proj"], nblocks=2, match_strict=False)),
         tt.BDLoRA(rank=4, alpha=6, blocks=2, block_a=("v_proj",), block_b=(), strict=False, targets=tuple(QVD))),
    Case("bdlora-bias-all", kit.bert,
         lora(["query"], use_bdlora=BdLoraConfig(target_modules_bd_a=["query"], nblocks=2), bias="all"),
         tt.BDLoRA(rank=4, alpha=6, blocks=2, block_a=("query",), block_b=(), bias="all", targets=("query",))),
]  # fmt: skip
MICA = [
    Case("mica", kit.llama, lora(QVD, init_lora_weights="mica"),
         tt.LoRA(rank=4, alpha=6, init="mica", targets=tuple(QVD))),
    Case("mica-conv1d", kit.gpt2, lora(["c_attn", "wte"], init_lora_weights="mica", fan_in_fan_out=True),
         tt.LoRA(rank=4, alpha=6, init="mica", targets=("c_attn", "wte"))),
]  # fmt: skip
VELORA = [
    Case("velora", kit.llama, lora(QVD, velora_config=VeloraConfig(num_groups=5)),
         tt.VeLoRA(rank=4, alpha=6, groups=5, targets=tuple(QVD))),
    Case("velora-bias-all", kit.bert, lora(["query"], velora_config=VeloraConfig(num_groups=4), bias="all"),
         tt.VeLoRA(rank=4, alpha=6, groups=4, bias="all", targets=("query",))),
]  # fmt: skip
VARIANTS = [*OFFSET, *KASA, *BLOCKS, *MICA, *VELORA]
