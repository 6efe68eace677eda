"""Settings of the methods that PEFT has, each written once for PEFT and once for us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
)
from torch import nn

import trimtab as tt
from tests.oracles import kit
from trimtab.adapt.contract import Method


@dataclass(frozen=True)
class Case:
    """One setting, for both sides."""

    name: str
    make: Callable[[], nn.Module]
    theirs: PeftConfig
    ours: Method
    fp32: bool = False
    """Whether, in fp64 too, the two sides round to fp32 in other places: Llama's norms do, and PEFT's softmax."""
    fp32_only: bool = False
    """PEFT computes in float32 whatever the dtype of the model."""
    other_gradients: tuple[str, ...] = ()
    """Slots of which PEFT's backward, written by hand, gives other gradients than its forward has."""


def lora(targets: Any, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=targets, init_lora_weights=True, **options)


QV = ("q_proj", "v_proj")
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 2},
    "alpha_pattern": {r"layers\.1\..*": 5},
}

LORA = [
    Case(
        "lora", kit.llama, lora(list(QV), r=4, lora_alpha=6), tt.LoRA(rank=4, alpha=6, targets=QV)
    ),
    Case(
        "rslora",
        kit.llama,
        lora(list(QV), r=4, use_rslora=True),
        tt.LoRA(rank=4, alpha=8, rslora=True, targets=QV),
    ),
    Case(
        "all-linear",
        kit.llama,
        lora("all-linear", r=3, lora_alpha=6),
        tt.LoRA(rank=3, alpha=6, targets="all-linear"),
    ),
    Case(
        "all-linear-bert",
        kit.bert,
        lora("all-linear", r=3, task_type=TaskType.SEQ_CLS),
        tt.LoRA(rank=3, alpha=8, train=("classifier",)),
    ),
    Case(
        "exclude",
        kit.llama,
        lora("all-linear", r=3, exclude_modules=["down_proj"]),
        tt.LoRA(rank=3, alpha=8, targets="all-linear", exclude="down_proj"),
    ),
    Case(
        "layers",
        kit.llama,
        lora(list(QV), r=3, layers_to_transform=[1]),
        tt.LoRA(rank=3, alpha=8, targets=QV, layers=(1,)),
    ),
    Case(
        "regex",
        kit.llama,
        lora(r".*\.1\..*_proj", r=3),
        tt.LoRA(rank=3, alpha=8, targets=r"re:.*\.1\..*_proj"),
    ),
    Case(
        "patterns",
        kit.llama,
        lora(["q_proj", "v_proj", "up_proj"], r=4, **PATTERNS),
        tt.LoRA(rank=4, alpha=8, targets=("q_proj", "v_proj", "up_proj"), **PATTERNS),
    ),
    Case(
        "bias-lora-only",
        kit.bert,
        lora(["query", "dense"], r=4, bias="lora_only"),
        tt.LoRA(rank=4, alpha=8, targets=("query", "dense"), bias="lora_only"),
    ),
    Case(
        "bias-all",
        kit.bert,
        lora(["query", "output.dense"], r=4, bias="all"),
        tt.LoRA(rank=4, alpha=8, targets=("query", "output.dense"), bias="all"),
    ),
    Case(
        "conv1d",
        kit.gpt2,
        lora(["c_attn", "c_proj"], r=4, fan_in_fan_out=True),
        tt.LoRA(rank=4, alpha=8, targets=("c_attn", "c_proj")),
    ),
    Case(
        "embedding",
        kit.gpt2,
        lora(["wte", "wpe"], r=4),
        tt.LoRA(rank=4, alpha=8, targets=("wte", "wpe")),
    ),
    Case(
        "input-embedding",
        kit.llama,
        lora(["embed_tokens", "lm_head"], r=4),
        tt.LoRA(rank=4, alpha=8, targets=("embed_tokens", "lm_head")),
    ),
    Case(
        "t5",
        kit.t5,
        lora(["q", "v", "wi"], r=4),
        tt.LoRA(rank=4, alpha=8, targets=("q", "v", "wi")),
    ),
    Case(
        "gated-t5",
        kit.gated_t5,
        lora(["k", "o", "wi_1", "wo"], r=4),
        tt.LoRA(rank=4, alpha=8, targets=("k", "o", "wi_1", "wo")),
    ),
    Case(
        "convolutions",
        kit.convolutions,
        lora(["embed", "line", "square", "head"], r=4),
        tt.LoRA(rank=4, alpha=8, targets=("embed", "line", "square", "head")),
    ),
    Case(
        "classifier",
        kit.bert,
        lora(["query"], r=4, task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"]),
        tt.LoRA(rank=4, alpha=8, targets=("query",), train=("classifier",)),
    ),
    Case(
        "score",
        kit.llama_classifier,
        lora(["v_proj"], r=4, modules_to_save=["score"]),
        tt.LoRA(rank=4, alpha=8, targets=("v_proj",), train=("score",)),
    ),
    Case(
        "two-layer-head",
        kit.roberta,
        lora(["query"], r=4, modules_to_save=["classifier"]),
        tt.LoRA(rank=4, alpha=8, targets=("query",), train=("classifier",)),
    ),
]
DORA = [
    Case(
        "dora",
        kit.llama,
        lora(["q_proj", "down_proj"], r=4, use_dora=True),
        tt.DoRA(rank=4, alpha=8, targets=("q_proj", "down_proj")),
    ),
    Case(
        "dora-bias",
        kit.bert,
        lora(["query", "dense"], r=4, use_dora=True, use_rslora=True),
        tt.DoRA(rank=4, alpha=8, rslora=True, targets=("query", "dense")),
    ),
    Case(
        "dora-conv1d",
        kit.gpt2,
        lora(["c_attn", "c_fc"], r=4, use_dora=True, fan_in_fan_out=True),
        tt.DoRA(rank=4, alpha=8, targets=("c_attn", "c_fc")),
    ),
    Case(
        "dora-embedding",
        kit.gpt2,
        lora(["wte"], r=4, use_dora=True),
        tt.DoRA(rank=4, alpha=8, targets="wte"),
    ),
    Case(
        "dora-convolutions",
        kit.convolutions,
        lora(["embed", "line", "square", "head"], r=4, use_dora=True),
        tt.DoRA(rank=4, alpha=8, targets=("embed", "line", "square", "head")),
    ),
]


def adalora(targets: Any, **options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(target_modules=targets, total_step=10, **options)


ADALORA = [
    Case(
        "adalora",
        kit.llama,
        adalora(list(QV), init_r=4, target_r=2, lora_alpha=6),
        tt.AdaLoRA(rank=4, target_rank=2, alpha=6, targets=QV),
    ),
    Case(
        "adalora-bert",
        kit.bert,
        adalora(["query", "dense"], init_r=3, target_r=2, bias="lora_only", orth_reg_weight=0.1),
        tt.AdaLoRA(
            rank=3,
            target_rank=2,
            alpha=8,
            orthogonal=0.1,
            targets=("query", "dense"),
            bias="lora_only",
        ),
    ),
    Case(
        "adalora-conv1d",
        kit.gpt2,
        adalora(["c_attn", "c_fc"], init_r=4, target_r=2, fan_in_fan_out=True),
        tt.AdaLoRA(rank=4, target_rank=2, alpha=8, targets=("c_attn", "c_fc")),
    ),
    Case(
        "adalora-classifier",
        kit.bert,
        adalora(["query"], init_r=4, target_r=4, modules_to_save=["classifier"]),
        tt.AdaLoRA(rank=4, target_rank=4, alpha=8, targets="query", train=("classifier",)),
    ),
]
IA3 = [
    Case(
        "ia3",
        kit.llama,
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        tt.IA3(),
    ),
    Case(
        "ia3-regular",
        kit.llama,
        IA3Config(target_modules=r".*\.(v|down)_proj", feedforward_modules=r".*down_proj"),
        tt.IA3(targets="v_proj", feedforward="down_proj"),
    ),
    Case(
        "ia3-t5",
        kit.t5,
        IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
        tt.IA3(),
    ),
    Case(
        "ia3-bert",
        kit.bert,
        IA3Config(
            target_modules=["key", "value", r"attention.output.dense"], feedforward_modules=[]
        ),
        tt.IA3(targets=("key", "value", "attention.output.dense"), feedforward=()),
    ),
    Case(
        "ia3-conv1d",
        kit.gpt2,
        IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=[], fan_in_fan_out=True),
        tt.IA3(targets=("c_attn", "c_fc"), feedforward=()),
    ),
]
PREFIX = [
    Case(
        "prefix-llama",
        kit.llama,
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        tt.Prefix(length=5),
    ),
    Case(
        "prefix-gpt2",
        kit.gpt2,
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        tt.Prefix(length=5),
    ),
    Case(
        "prefix-bert",
        kit.bert,
        PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5),
        tt.Prefix(length=5, train=("classifier",)),
    ),
]
SHIRA = [
    Case(
        "shira",
        kit.llama,
        ShiraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=2, random_seed=3),
        tt.SHiRA(rank=2, seed=3, targets=("q_proj", "v_proj", "down_proj")),
    ),
    Case(
        "shira-bert",
        kit.bert,
        ShiraConfig(target_modules=["query"], r=5, random_seed=0, modules_to_save=["classifier"]),
        tt.SHiRA(rank=5, seed=0, targets=("query",), train=("classifier",)),
    ),
]
PROMPT = [
    Case(
        "prompt-llama",
        kit.llama,
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        tt.Prompt(length=5),
        fp32=True,
    ),
    Case(
        "prompt-gpt2",
        kit.gpt2,
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        tt.Prompt(length=5, init="normal"),
    ),
    Case(
        "prompt-window",
        kit.mistral,
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        tt.Prompt(length=5, init="uniform"),
        fp32=True,
    ),
    Case(
        "prompt-bert",
        kit.bert,
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5),
        tt.Prompt(length=5, train=("classifier",)),
    ),
    Case(
        "prompt-t5",
        kit.t5,
        PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=5, num_transformer_submodules=1
        ),
        tt.Prompt(length=5),
    ),
    Case(
        "prompt-roberta",
        kit.roberta,
        PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=5),
        tt.Prompt(length=5, train=("classifier",)),
    ),
]
LLAMA_ADAPTER = [
    Case(
        f"llama-adapter-{name}",
        make,
        AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, adapter_len=4, adapter_layers=top),
        tt.LlamaAdapter(length=4, top=top, gate="scalar"),
        fp32=True,
    )
    for name, make, top in (("llama", kit.llama, 2), ("mistral", kit.mistral, 2))
]
ENCODED = [
    Case(
        "ptuning-llama",
        kit.llama,
        PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, encoder_hidden_size=6
        ),
        tt.PTuning(length=4, hidden=6),
        fp32=True,
    ),
    Case(
        "ptuning-lstm-bert",
        kit.bert,
        PromptEncoderConfig(
            task_type=TaskType.SEQ_CLS, num_virtual_tokens=4, encoder_hidden_size=6,
            encoder_reparameterization_type="LSTM",
        ),
        tt.PTuning(length=4, hidden=6, encoder="lstm", train=("classifier",)),
    ),
    Case(
        "prefix-mlp-llama",
        kit.llama,
        PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, encoder_hidden_size=6, prefix_projection=True
        ),
        tt.Prefix(length=4, hidden=6),
    ),
]  # fmt: skip
"""Tables that an encoder makes in training; PEFT's file holds the table alone."""
QVD = ["q_proj", "v_proj", "down_proj"]
WEIGHT = [
    Case("loha", kit.llama, LoHaConfig(target_modules=QVD, r=4, alpha=6), tt.LoHa(rank=4, alpha=6, targets=tuple(QVD))),
    Case("loha-convolutions", kit.convolutions, LoHaConfig(target_modules=["line", "square", "head"], r=3, alpha=6),
         tt.LoHa(rank=3, alpha=6, targets=("line", "square", "head"))),
    Case("lokr", kit.llama, LoKrConfig(target_modules=QVD, r=2, alpha=6), tt.LoKr(rank=2, alpha=6, targets=tuple(QVD))),
    Case("loha-patterns", kit.llama,
         LoHaConfig(target_modules=QVD, r=4, alpha=6, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}),
         tt.LoHa(rank=4, alpha=6, targets=tuple(QVD), rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3})),
    Case("lokr-patterns", kit.llama, LoKrConfig(target_modules=QVD, r=2, alpha=6, rank_pattern={r"layers\.0\..*": 1}),
         tt.LoKr(rank=2, alpha=6, targets=tuple(QVD), rank_pattern={r"layers\.0\..*": 1})),
    Case("lokr-both", kit.llama, LoKrConfig(target_modules=QVD, r=1, decompose_both=True, decompose_factor=4),
         tt.LoKr(rank=1, both=True, factor=4, targets=tuple(QVD))),
    Case("lokr-whole", kit.llama, LoKrConfig(target_modules=QVD, r=8, decompose_factor=3),
         tt.LoKr(rank=8, factor=3, targets=tuple(QVD))),
    Case("loha-tucker", kit.convolutions,
         LoHaConfig(target_modules=["line", "square", "head"], r=3, alpha=6, use_effective_conv2d=True),
         tt.LoHa(rank=3, alpha=6, tucker=True, targets=("line", "square", "head")),
         other_gradients=("hada_w1_a", "hada_w2_a")),
    Case("loha-tucker-pictures", kit.pictures,
         LoHaConfig(target_modules=["square", "point"], r=3, alpha=6, use_effective_conv2d=True),
         tt.LoHa(rank=3, alpha=6, tucker=True, targets=("square", "point")),
         other_gradients=("hada_w1_a", "hada_w2_a")),
    Case("loha-groups", kit.groups, LoHaConfig(target_modules=["line", "square"], r=2),
         tt.LoHa(rank=2, targets=("line", "square"))),
    Case("lokr-convolutions", kit.convolutions, LoKrConfig(target_modules=["line", "square", "head"], r=1, alpha=6),
         tt.LoKr(rank=1, alpha=6, targets=("line", "square", "head"))),
    Case("lokr-convolutions-whole", kit.convolutions, LoKrConfig(target_modules=["line", "square", "head"], r=8),
         tt.LoKr(rank=8, targets=("line", "square", "head"))),
    Case("lokr-convolutions-both", kit.pictures,
         LoKrConfig(target_modules=["square", "point", "wide"], r=1, decompose_both=True, decompose_factor=4),
         tt.LoKr(rank=1, both=True, factor=4, targets=("square", "point", "wide"))),
    Case("lokr-tucker", kit.convolutions,
         LoKrConfig(target_modules=["line", "square", "head"], r=2, use_effective_conv2d=True, decompose_factor=1),
         tt.LoKr(rank=2, factor=1, tucker=True, targets=("line", "square", "head"))),
    Case("lokr-tucker-pictures", kit.pictures,
         LoKrConfig(target_modules=["square", "point", "wide"], r=1, use_effective_conv2d=True, decompose_factor=2),
         tt.LoKr(rank=1, tucker=True, factor=2, targets=("square", "point", "wide"))),
    Case("lokr-groups", kit.groups, LoKrConfig(target_modules=["line", "square"], r=1),
         tt.LoKr(rank=1, targets=("line", "square"))),
    Case("hira-convolutions", kit.convolutions, HiraConfig(target_modules=["line", "square", "head"], r=4),
         tt.HiRA(rank=4, targets=("line", "square", "head"))),
    Case("hira-embedding", kit.bert, HiraConfig(target_modules=["word_embeddings", "query"], r=4),
         tt.HiRA(rank=4, targets=("word_embeddings", "query"))),
    Case("hira", kit.llama, HiraConfig(target_modules=QVD, r=4), tt.HiRA(rank=4, targets=tuple(QVD))),
    Case("hira-conv1d", kit.gpt2, HiraConfig(target_modules=["c_attn", "c_fc"], r=4, fan_in_fan_out=True),
         tt.HiRA(rank=4, targets=("c_attn", "c_fc"))),
    Case("fourierft", kit.llama, FourierFTConfig(target_modules=QVD, n_frequency=20, scaling=30.0),
         tt.FourierFT(entries=20, alpha=30.0, targets=tuple(QVD)), fp32_only=True),
    Case("fourierft-patterns", kit.llama,
         FourierFTConfig(target_modules=QVD, n_frequency=20, scaling=30.0, n_frequency_pattern={"v_proj": 7}),
         tt.FourierFT(entries=20, alpha=30.0, targets=tuple(QVD), entries_pattern={"v_proj": 7}), fp32_only=True),
    Case("fourierft-seed", kit.bert, FourierFTConfig(target_modules=["query"], n_frequency=9, random_loc_seed=3),
         tt.FourierFT(entries=9, seed=3, targets=("query",)), fp32_only=True),
    Case("vera", kit.llama, VeraConfig(target_modules=QVD, r=8, d_initial=0.2),
         tt.VeRA(rank=8, d_initial=0.2, targets=tuple(QVD))),
    Case("vera-conv1d", kit.gpt2, VeraConfig(target_modules=["c_attn", "c_fc"], r=8, projection_prng_key=4,
         fan_in_fan_out=True),
         tt.VeRA(rank=8, seed=4, targets=("c_attn", "c_fc"))),
    Case("randlora", kit.llama, RandLoraConfig(target_modules=QVD, r=8, randlora_alpha=80),
         tt.RandLoRA(rank=8, alpha=80, targets=tuple(QVD))),
    Case("randlora-sparse", kit.llama, RandLoraConfig(target_modules=QVD, r=8, randlora_alpha=80, sparse=True),
         tt.RandLoRA(rank=8, alpha=80, drawing="sparse", targets=tuple(QVD))),
    Case("randlora-very-sparse", kit.gpt2,
         RandLoraConfig(target_modules=["c_attn", "c_fc"], r=7, randlora_alpha=7, very_sparse=True,
                        projection_prng_key=5, fan_in_fan_out=True),
         tt.RandLoRA(rank=7, alpha=7, drawing="very-sparse", seed=5, targets=("c_attn", "c_fc"))),
    Case("miss", kit.llama, MissConfig(target_modules=QVD, r=5), tt.MiSS(rank=5, targets=tuple(QVD))),
    Case("miss-bat", kit.llama, MissConfig(target_modules=["q_proj", "down_proj"], r=4, init_weights="bat"),
         tt.MiSS(rank=4, variant="bat", targets=("q_proj", "down_proj"))),
    Case("miss-mini", kit.llama, MissConfig(target_modules=QVD, r=4, mini_r=8, init_weights="mini"),
         tt.MiSS(rank=4, variant="mini", mini=8, targets=tuple(QVD))),
]  # fmt: skip
ROTATION = [
    Case("oft", kit.llama, OFTConfig(target_modules=QVD, oft_block_size=8), tt.OFT(block=8, targets=tuple(QVD))),
    Case("oft-blocks", kit.llama, OFTConfig(target_modules=QVD, r=4, oft_block_size=0),
         tt.OFT(blocks=4, targets=tuple(QVD))),
    Case("oft-shared", kit.bert, OFTConfig(target_modules=["output.dense"], oft_block_size=4, block_share=True),
         tt.OFT(block=4, share=True, targets=("output.dense",))),
    Case("oft-exact", kit.llama, OFTConfig(target_modules=QVD, oft_block_size=8, use_cayley_neumann=False),
         tt.OFT(block=8, series="inverse", targets=tuple(QVD)), fp32_only=True),
    Case("oft-exact-shared", kit.llama,
         OFTConfig(target_modules=QVD, oft_block_size=4, use_cayley_neumann=False, block_share=True),
         tt.OFT(block=4, series="inverse", share=True, targets=tuple(QVD)), fp32_only=True),
    *(
        Case(f"oft-terms-{n}", kit.llama,
             OFTConfig(target_modules=QVD, oft_block_size=8, num_cayley_neumann_terms=n),
             tt.OFT(block=8, terms=n, targets=tuple(QVD)))
        for n in (2, 3, 4, 6, 7)
    ),
    Case("oft-constrained", kit.llama, OFTConfig(target_modules=QVD, oft_block_size=8, coft=True, eps=0.5),
         tt.OFT(block=8, epsilon=0.5, targets=tuple(QVD)), fp32_only=True),
    Case("oft-constrained-shared", kit.llama,
         OFTConfig(target_modules=QVD, oft_block_size=4, coft=True, eps=0.1, block_share=True),
         tt.OFT(block=4, epsilon=0.1, share=True, targets=tuple(QVD)), fp32_only=True),
    Case("oft-embedding", kit.bert, OFTConfig(target_modules=["word_embeddings", "query"], oft_block_size=8),
         tt.OFT(block=8, targets=("word_embeddings", "query"))),
    Case("oft-point", kit.pictures, OFTConfig(target_modules=["point", "head"], oft_block_size=2),
         tt.OFT(block=2, targets=("point", "head"))),
    Case("boft-convolutions", kit.pictures, BOFTConfig(target_modules=["square", "point", "head"], boft_block_size=2),
         tt.BOFT(block=2, targets=("square", "point", "head")), fp32_only=True),
    Case("boft-number", kit.bert,
         BOFTConfig(target_modules=["query", "output.dense"], boft_block_size=0, boft_block_num=4),
         tt.BOFT(blocks=4, targets=("query", "output.dense")), fp32_only=True),
    Case("hra-convolutions", kit.pictures, HRAConfig(target_modules=["square", "point", "head"], r=4),
         tt.HRA(rank=4, targets=("square", "point", "head")), fp32_only=True),
    Case("hra-convolutions-orthogonal", kit.pictures, HRAConfig(target_modules=["square", "wide"], r=3, apply_GS=True),
         tt.HRA(rank=3, orthogonal=True, targets=("square", "wide")), fp32_only=True),
    Case("boft", kit.bert, BOFTConfig(target_modules=["query", "output.dense"]),
         tt.BOFT(targets=("query", "output.dense")), fp32_only=True),
    Case("hra", kit.llama, HRAConfig(target_modules=QVD, r=4), tt.HRA(rank=4, targets=tuple(QVD)), fp32_only=True),
    Case("hra-orthogonal", kit.llama, HRAConfig(target_modules=QVD, r=3, apply_GS=True),
         tt.HRA(rank=3, orthogonal=True, targets=tuple(QVD)), fp32_only=True),
]  # fmt: skip
QUERY, ON_QUERY = ["query", "output.dense"], {"targets": ("query", "output.dense")}
BIASED = [
    Case("oft-bias", kit.bert, OFTConfig(target_modules=QUERY, oft_block_size=8, bias="oft_only"),
         tt.OFT(block=8, bias="targets", **ON_QUERY)),
    Case("oft-bias-all", kit.bert,
         OFTConfig(target_modules=QUERY, oft_block_size=8, coft=True, eps=0.5, bias="all"),
         tt.OFT(block=8, epsilon=0.5, bias="all", **ON_QUERY), fp32_only=True),
    Case("boft-bias", kit.pictures,
         BOFTConfig(target_modules=["square", "head"], boft_block_size=2, bias="boft_only"),
         tt.BOFT(block=2, bias="targets", targets=("square", "head")), fp32_only=True),
    Case("boft-bias-all", kit.bert, BOFTConfig(target_modules=QUERY, bias="all"),
         tt.BOFT(bias="all", **ON_QUERY), fp32_only=True),
    Case("hra-bias", kit.bert, HRAConfig(target_modules=QUERY, r=4, bias="hra_only"),
         tt.HRA(rank=4, bias="targets", **ON_QUERY), fp32_only=True),
    Case("hra-bias-all", kit.bert, HRAConfig(target_modules=["query"], r=4, bias="all"),
         tt.HRA(rank=4, bias="all", targets=("query",)), fp32_only=True),
    Case("fourierft-bias", kit.bert, FourierFTConfig(target_modules=QUERY, n_frequency=20, bias="fourier_only"),
         tt.FourierFT(entries=20, bias="targets", **ON_QUERY), fp32_only=True),
    Case("fourierft-bias-all", kit.bert, FourierFTConfig(target_modules=QUERY, n_frequency=20, bias="all"),
         tt.FourierFT(entries=20, bias="all", **ON_QUERY), fp32_only=True),
    Case("miss-bias", kit.bert, MissConfig(target_modules=QUERY, r=4, bias="MiSS_only"),
         tt.MiSS(rank=4, bias="targets", **ON_QUERY)),
    Case("miss-bias-all", kit.bert, MissConfig(target_modules=["query"], r=4, init_weights="bat", bias="all"),
         tt.MiSS(rank=4, variant="bat", bias="all", targets=("query",))),
    Case("vera-bias", kit.bert, VeraConfig(target_modules=QUERY, r=8, bias="vera_only"),
         tt.VeRA(rank=8, bias="targets", **ON_QUERY)),
    Case("vera-bias-all", kit.bert, VeraConfig(target_modules=QUERY, r=8, bias="all"),
         tt.VeRA(rank=8, bias="all", **ON_QUERY)),
    Case("randlora-bias", kit.bert, RandLoraConfig(target_modules=QUERY, r=8, randlora_alpha=80, bias="randlora_only"),
         tt.RandLoRA(rank=8, alpha=80, bias="targets", **ON_QUERY)),
    Case("randlora-bias-all", kit.bert, RandLoraConfig(target_modules=QUERY, r=8, randlora_alpha=80, bias="all"),
         tt.RandLoRA(rank=8, alpha=80, bias="all", **ON_QUERY)),
]  # fmt: skip
SELECTION = [
    Case("norms", kit.bert, LNTuningConfig(target_modules=["LayerNorm"]), tt.Norms()),
    Case("norms-rms", kit.llama, LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
         tt.Norms(targets=("input_layernorm", "post_attention_layernorm"))),
    Case("tokens", kit.llama, TrainableTokensConfig(token_indices=[3, 9, 50], target_modules=["embed_tokens"]),
         tt.Tokens(ids=(3, 9, 50), targets=("embed_tokens",))),
]  # fmt: skip
CASES = [
    *LORA, *DORA, *ADALORA, *IA3, *PREFIX, *PROMPT, *LLAMA_ADAPTER, *WEIGHT, *ROTATION, *BIASED, *SELECTION, *SHIRA,
]  # fmt: skip
