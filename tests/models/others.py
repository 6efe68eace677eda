"""Tiny models of families that have no laws of their own, beside those that have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from tests import tiny
from tests.tiny import CASES, SMALL_DECODER, VOCABULARY
from trimtab.adapt.tree import anatomy_of


def _decoder(config: type, model: type, **changes: Any) -> nn.Module:
    given = {k: v for k, v in SMALL_DECODER.items() if k != "num_key_value_heads"}
    built: nn.Module = tiny._seeded(lambda: model(config(**{**given, **changes})))
    return built


def gpt_neox() -> nn.Module:
    return _decoder(
        GPTNeoXConfig, GPTNeoXForCausalLM, hidden_dropout=0.0, use_parallel_residual=False
    )


def phi3() -> nn.Module:
    return _decoder(Phi3Config, Phi3ForCausalLM, num_key_value_heads=2)


def opt(first: bool = True) -> nn.Module:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    return _decoder(OPTConfig, OPTForCausalLM, do_layer_norm_before=first, **sizes)


def gpt_neo() -> nn.Module:
    kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
    return _decoder(GPTNeoConfig, GPTNeoForCausalLM, **kinds, window_size=4)


def modernbert() -> nn.Module:
    return _decoder(ModernBertConfig, ModernBertForMaskedLM, cls_token_id=1, sep_token_id=2)


def distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return tiny._seeded(lambda: DistilBertForSequenceClassification(config))


def mbart() -> nn.Module:
    config = MBartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tiny._seeded(lambda: MBartForConditionalGeneration(config))


MODELS = {
    **{name: case.make for name, case in CASES.items() if name not in ("mixed", "classifier")},
    "distilbert": distilbert,
    "gpt-neo": gpt_neo,
    "gpt-neox": gpt_neox,
    "mbart": mbart,
    "modernbert": modernbert,
    "opt": opt,
    "opt-post-norm": lambda: opt(first=False),
    "phi3": phi3,
}


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    for case in CASES.values():
        if type(case.make()) is type(model):
            return case.inputs()
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    both = anatomy_of(model).encoder_decoder
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if both else {"input_ids": ids}
