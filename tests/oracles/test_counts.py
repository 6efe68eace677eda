"""Trainable parameters on models of real shapes: closed forms, most of them printed in a paper or by PEFT."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import trimtab as tt
from trimtab.adapt.contract import Method
from trimtab.adapt.describe import resolve

_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
_LLAMA_3B = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
_T0_3B = {
    "vocab_size": 32128, "d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32, "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_DEBERTA_XXL = {
    "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 24,
}  # fmt: skip
_GPT_175B = {
    "hidden_size": 12288, "ffn_dim": 49152, "num_hidden_layers": 96, "num_attention_heads": 96,
    "word_embed_proj_dim": 12288,
}  # fmt: skip
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
SHAPES: dict[str, tuple[Any, Any]] = {
    "roberta-base": (RobertaForSequenceClassification, RobertaConfig(**_ROBERTA)),
    "roberta-large": (RobertaForSequenceClassification, RobertaConfig(**_ROBERTA, **_LARGE)),
    "bert-base": (BertModel, BertConfig()),
    "bert-base-classifier": (BertForSequenceClassification, BertConfig()),
    "bert-large": (BertModel, BertConfig(**_LARGE)),
    "gpt2-medium": (GPT2LMHeadModel, GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "llama-7b": (LlamaForCausalLM, LlamaConfig()),  # the defaults are its shapes
    "llama-3.2-3b": (LlamaForCausalLM, LlamaConfig(**_LLAMA_3B)),
    "deberta-xxl": (DebertaV2Model, DebertaV2Config(**_DEBERTA_XXL)),
    "gpt-175b": (OPTForCausalLM, OPTConfig(**_GPT_175B)),
    "t0-3b": (T5ForConditionalGeneration, T5Config(**_T0_3B)),
}
BASES = {
    "roberta-large": 355_361_794,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "gpt2-medium": 354_823_168,
    "llama-7b": 6_738_415_616,
    "llama-3.2-3b": 3_212_749_824,
    "t0-3b": 2_849_757_184 - 32128 * 2048,  # transformers ties its head
}

QUERY_VALUE = ("queries", "values")
COUNTS: list[tuple[str, Method, int]] = [
    # LoRA: layers · targets · r · (in + out)
    ("roberta-base", tt.LoRA(rank=8, targets=QUERY_VALUE), 12 * 2 * 8 * (768 + 768)),
    ("roberta-base", tt.LoRA(rank=8, targets=QUERY_VALUE), 294_912),
    ("roberta-large", tt.LoRA(rank=8, targets=QUERY_VALUE), 786_432),
    ("llama-7b", tt.LoRA(rank=8, targets=QUERY_VALUE), 4_194_304),
    ("llama-7b", tt.LoRA(rank=16), 39_976_960),
    ("llama-3.2-3b", tt.LoRA(rank=32, targets=QUERY_VALUE), 9_175_040),
    # on GPT-2 the three are one fused layer, of (1024, 3072)
    ("gpt2-medium", tt.LoRA(rank=4, targets="fused_qkv"), 24 * 4 * (1024 + 3 * 1024)),
    ("deberta-xxl", tt.LoRA(rank=16, targets=QUERY_VALUE), 4_718_592),
    ("gpt-175b", tt.LoRA(rank=4, targets=QUERY_VALUE), 18_874_368),
    ("gpt-175b", tt.LoRA(rank=1, targets=QUERY_VALUE), 4_718_592),
    ("t0-3b", tt.LoRA(rank=4, train=("norms",)), 9_097_216),
    # rsLoRA, dropout and alpha train nothing more; biases and patterns do
    ("llama-7b", tt.LoRA(rank=8, alpha=4, rslora=True, dropout=0.1, targets=QUERY_VALUE), 4_194_304),
    ("roberta-base", tt.LoRA(rank=8, targets=QUERY_VALUE, bias="lora_only"), 294_912 + 12 * 2 * 768),
    ("llama-7b", tt.LoRA(rank=8, targets=QUERY_VALUE, rank_pattern={"q_proj": 2}), 32 * (2 + 8) * 8192),
    ("llama-7b", tt.LoRA(rank=8, targets=QUERY_VALUE, layers=(0, -1)), 2 * 2 * 8 * 8192),
    ("roberta-base", tt.LoRA(rank=8, targets=QUERY_VALUE, train=("classifier",)),
     294_912 + (768 * 768 + 768) + (768 * 2 + 2)),
    # first factors that are kept are not trained
    ("llama-3.2-3b", tt.LoRA(rank=32, targets=QUERY_VALUE, init="pissa"), 9_175_040),
    # DoRA: one magnitude per output more
    ("llama-3.2-3b", tt.DoRA(rank=32, targets=QUERY_VALUE), 9_289_728),
    # LoRA-FA trains B alone; LoRA+ and few bits change nothing
    ("llama-3.2-3b", tt.LoRA(rank=32, frozen_a=True, targets=QUERY_VALUE), 3_670_016),
    ("llama-3.2-3b", tt.LoRA(rank=32, plus=16, bits=8, targets=QUERY_VALUE), 9_175_040),
    # AdaLoRA: one value per component more
    ("llama-3.2-3b", tt.AdaLoRA(rank=64, targets=QUERY_VALUE), 18_353_664),
    # SHiRA: as many values as the LoRA of its rank, or a share of the weights
    ("llama-3.2-3b", tt.SHiRA(rank=32, targets=QUERY_VALUE), 9_175_040),
    ("llama-7b", tt.SHiRA(share=0.005, targets=QUERY_VALUE), 32 * 2 * round(0.005 * 4096 * 4096)),
    # (IA)³: keys, values and the inner width
    ("llama-7b", tt.IA3(), 614_400),
    ("llama-3.2-3b", tt.IA3(), 286_720),
    ("t0-3b", tt.IA3(), 540_672),
    ("llama-3.2-3b", tt.IA3(targets=("q_proj", "k_proj", "v_proj", "o_proj"),
                            feedforward=("gate_proj", "up_proj", "down_proj")), 630_784),
    ("gpt2-medium", tt.IA3(), 24 * (2 * 1024 + 4096)),
    # prefix tuning: layers · 2 · n · key heads · head width
    ("llama-3.2-3b", tt.Prefix(length=50), 2_867_200),
    ("llama-3.2-3b", tt.Prefix(length=200), 11_468_800),
    ("gpt2-medium", tt.Prefix(length=10), 491_520),
    ("roberta-large", tt.method("p-tuning-v2"), 6_291_456),
    ("gpt2-medium", tt.Prefix(length=10, hidden=512), 25_750_016),
    ("t0-3b", tt.Prefix(length=10, targets=("self_attention", "cross_attention")), 10 * 2 * 72 * 2048),
    # prompts: tokens · width, and their encoders
    ("llama-3.2-3b", tt.Prompt(length=200), 614_400),
    ("t0-3b", tt.Prompt(length=20), 40_960),
    ("llama-3.2-3b", tt.PTuning(length=20), 28_382_208),
    ("bert-base", tt.PTuning(length=9, encoder="lstm"),
     9 * 768 + 2 * 2 * 4 * 384 * (768 + 384 + 2) + 2 * (768 * 768 + 768)),
    # LLaMA-Adapter: tokens · width and a gate per head, in the upper layers
    ("llama-7b", tt.LlamaAdapter(length=10, top=30), 30 * (10 * 4096 + 32)),
    ("llama-7b", tt.LlamaAdapter(length=10, top=30, gate="scalar"), 1_228_830),
    # Houlsby: two per layer, 2md + m + d each
    ("bert-base", tt.Bottleneck(size=64), 2_379_264),
    ("bert-large", tt.Bottleneck(size=64), 6_343_680),
    ("bert-base", tt.Bottleneck(size=64, train=("norms",)), 2_379_264 + 25 * 2 * 768),
    ("bert-base", tt.Bottleneck(reduction=12), 2_379_264),
    # Pfeiffer and parallel: one per layer; a learned scale is one value more, Adapter+ has one per channel
    ("bert-base", tt.Pfeiffer(), 894_528),
    ("bert-base", tt.Pfeiffer(size=48), 12 * (2 * 48 * 768 + 48 + 768)),
    ("bert-base", tt.Parallel(), 7_091_712),
    ("bert-base", tt.Parallel(scaling="learned"), 7_091_712 + 12),
    ("llama-7b", tt.Parallel(size=512), 32 * (2 * 512 * 4096 + 512 + 4096)),
    ("bert-base", tt.AdapterPlus(), 12 * (2 * 8 * 768 + 8 + 2 * 768)),
    # Compacter: two per layer of 2k(d + m) + m + d, and n³ for all; ++ after the feed-forward only
    ("bert-base", tt.Compacter(), 24 * (2 * (768 + 24) + 24 + 768) + 4**3),
    ("bert-base", tt.Compacter(targets="mlp_output", rank=2), 12 * (2 * 2 * (768 + 24) + 24 + 768) + 4**3),
    # AdapterFusion: Q and K with biases, V without; the parts are not trained
    ("bert-base", tt.Fusion(), 12 * (3 * 768**2 + 2 * 768)),
    # LoReFT: 2rd + r per block and end
    ("llama-7b", tt.LoReFT(rank=4, layers=(8,), first=0, last=1), 32_772),
    ("llama-7b", tt.LoReFT(rank=8), 32 * 2 * (2 * 8 * 4096 + 8)),
    ("llama-7b", tt.DiReFT(rank=8, tied=True), 32 * (2 * 8 * 4096 + 8)),
    ("t0-3b", tt.NoReFT(rank=1), 24 * 2 * (2 * 2048 + 1)),
    ("t0-3b", tt.Bottleneck(size=None, reduction=32, targets="mlp_output", train=("norms",)), 12_934_144),
    # BitFit: every bias outside the head
    ("t0-3b", tt.BitFit(targets=("q", "k", "v", "o", "wi_0", "wi_1"), train=("norms",)), 1_331_200),
    ("bert-base", tt.BitFit(), 102_912),
    ("bert-base-classifier", tt.BitFit(), 102_912),
    ("bert-base-classifier", tt.BitFit(train=("classifier",)), 102_912 + 768 * 2 + 2),
    ("bert-large", tt.BitFit(), 272_384),
    ("roberta-base", tt.BitFit(), 102_144),  # no pooler in the classifier
    # SpotTune: the inner method, and a policy of one hidden layer with two logits per block
    ("llama-3.2-3b", tt.SpotTune(inner=tt.LoRA(rank=32, targets=QUERY_VALUE), hidden=64),
     9_175_040 + 3072 + (3072 * 64 + 64) + 64 * 2 * 28 + 2 * 28),
    # the low-rank family on Llama-3.2-3B, queries and values
    ("llama-3.2-3b", tt.LoHa(rank=32, targets=QUERY_VALUE), 18_350_080),
    ("llama-3.2-3b", tt.LoKr(rank=32, factor=4, targets=QUERY_VALUE), 2_294_656),
    ("llama-3.2-3b", tt.VeRA(rank=256, targets=QUERY_VALUE), 129_024),
    ("llama-3.2-3b", tt.RandLoRA(rank=32, targets=QUERY_VALUE), 9_289_728),
    ("llama-3.2-3b", tt.FourierFT(targets=QUERY_VALUE), 56_000),
    ("llama-3.2-3b", tt.HiRA(rank=32, targets=QUERY_VALUE), 9_175_040),
    ("llama-3.2-3b", tt.MiSS(rank=64, targets=QUERY_VALUE), 28 * 64 * (3072 + 1024)),
    ("llama-3.2-3b", tt.MoRA(rank=8, targets=QUERY_VALUE, variant="sharing"), 28 * (222**2 + 181**2)),
    # rotations
    ("llama-3.2-3b", tt.OFT(blocks=32, targets=QUERY_VALUE), 8_171_520),
    ("llama-3.2-3b", tt.BOFT(targets=QUERY_VALUE), 802_816),
    ("llama-3.2-3b", tt.HRA(rank=8, targets=QUERY_VALUE), 28 * 2 * 3072 * 8),
    # norms, tokens, masks, differences
    ("llama-3.2-3b", tt.Norms(), 175_104),
    ("t0-3b", tt.Norms(), 249_856),
    ("llama-3.2-3b", tt.Tokens(ids=(5, 6, 7)), 3 * 3072),
    ("bert-base", tt.Piggyback(exclude="pooler.dense"), 84_934_656),
    ("bert-base", tt.DiffPruning(exclude="pooler.dense"), 2 * 84_934_656 + 12 * 6),
    # full training of the norms, and of a head
    ("llama-3.2-3b", tt.Full(targets=("norms",)), 175_104),
    ("t0-3b", tt.Full(targets=("norms",)), 249_856),
    ("bert-base-classifier", tt.Full(targets=("classifier",)), 768 * 2 + 2),
]  # fmt: skip


@cache
def on_meta(name: str) -> nn.Module:
    model_class, config = SHAPES[name]
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model


@pytest.mark.parametrize(("name", "count"), BASES.items())
def test_the_bases_have_their_known_sizes(name: str, count: int) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == count


@pytest.mark.parametrize(
    ("name", "method", "count"), COUNTS, ids=[f"{n}-{m.kind}-{c}" for n, m, c in COUNTS]
)
def test_trained_parameters_equal_the_closed_form(name: str, method: Method, count: int) -> None:
    model = on_meta(name)
    assert f" {count:,} parameters" in resolve(model, method).splitlines()[0]
    adapter = tt.attach(model, method, "x")
    try:
        assert adapter.count == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert all(tensor.is_meta for tensor in adapter.tensors.values())
        assert f" {count:,} parameters" in tt.describe(model)
    finally:
        tt.detach(model, "x")
    assert all(parameter.requires_grad for parameter in model.parameters())
