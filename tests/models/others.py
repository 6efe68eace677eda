"""Tiny models of families that have no laws of their own, beside those that have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from tests import tiny
from tests.tiny import CASES, SMALL_DECODER, SMALL_ENCODER, VOCABULARY

_DECODER = {k: v for k, v in SMALL_DECODER.items() if k != "num_key_value_heads"}
_ENCODER = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_BOTH: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_PICTURES = {**_ENCODER, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
_TOWER = {**_ENCODER, "intermediate_size": 48}


def _made(auto: Any, model_type: str, sizes: dict[str, Any], **changes: Any) -> nn.Module:
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    built: nn.Module = tiny._seeded(lambda: auto.from_config(config))
    return built


_causal = partial(_made, AutoModelForCausalLM)
gpt_neox = partial(_causal, "gpt_neox", _DECODER, hidden_dropout=0.0, use_parallel_residual=False)
phi3 = partial(_causal, "phi3", SMALL_DECODER)
gpt_bigcode = partial(
    _causal, "gpt_bigcode", _DECODER, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
modernbert = partial(
    _made, AutoModelForMaskedLM, "modernbert", _DECODER, cls_token_id=1, sep_token_id=2
)
opt = partial(_causal, "opt", _DECODER, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
_distilbert = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: case.make for name, case in CASES.items() if name not in ("mixed", "classifier")},
    "distilbert": partial(
        _made, AutoModelForSequenceClassification, "distilbert", _distilbert, dropout=0.0
    ),
    "electra": partial(
        _made, AutoModelForSequenceClassification, "electra", SMALL_ENCODER, embedding_size=32
    ),
    "gpt-bigcode": gpt_bigcode,
    "gpt-neo": partial(
        _causal, "gpt_neo", _DECODER, attention_types=[[["global", "local"], 1]], num_layers=2, window_size=4
    ),
    "gpt-neox": gpt_neox,
    "gptj": partial(_causal, "gptj", _DECODER, n_embd=32, n_head=4, n_layer=2, rotary_dim=4, resid_pdrop=0.0),
    "m2m-100": partial(_made, AutoModelForSeq2SeqLM, "m2m_100", _BOTH),
    "marian": partial(_made, AutoModelForSeq2SeqLM, "marian", _BOTH),
    "mbart": partial(_made, AutoModelForSeq2SeqLM, "mbart", _BOTH),
    "modernbert": modernbert,
    "opt": opt,
    "opt-post-norm": partial(opt, do_layer_norm_before=False),
    "pegasus": partial(_made, AutoModelForSeq2SeqLM, "pegasus", _BOTH),
    "blenderbot": partial(_made, AutoModelForSeq2SeqLM, "blenderbot", _BOTH),
    "phi": partial(_causal, "phi", SMALL_DECODER, resid_pdrop=0.0),
    "phi3": phi3,
    "starcoder2": partial(_causal, "starcoder2", SMALL_DECODER, residual_dropout=0.0),
    "dinov2": partial(_made, AutoModelForImageClassification, "dinov2", _PICTURES, mlp_ratio=3),
    "deit": partial(
        _made, AutoModelForImageClassification, "deit", _PICTURES, architectures=["DeiTForImageClassification"]
    ),
    "siglip": partial(
        _made, AutoModel, "siglip", {}, text_config={**_TOWER, "vocab_size": VOCABULARY, "projection_size": 32},
        vision_config=_PICTURES,
    ),
}  # fmt: skip


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    for case in CASES.values():
        if type(case.make()) is type(model):
            return case.inputs()
    name = type(model).__name__
    if name.startswith("Siglip"):
        return CASES["clip"].inputs()
    if "Image" in name:
        return CASES["vit"].inputs()
    decodes = "ConditionalGeneration" in name or "MTModel" in name
    return CASES["bart" if decodes else "bert"].inputs()
