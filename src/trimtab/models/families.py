"""Architecture families: where blocks, attention, MLP, norms and embeddings are, by module paths.

`Family` says what each role means. An architecture that no family describes is read by the ``GENERIC``
rules, which know the usual names only; ask for roles that it lacks and an error says so. Keys are the
``model_type`` of a transformers config.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from trimtab.models.family import Family

LLAMA = Family(
    blocks=("**.layers.*",),
    attention=("**.layers.*.self_attn",),
    mlp=("**.layers.*.mlp", "**.layers.*.block_sparse_moe", "**.layers.*.feed_forward"),
    queries=("**.self_attn.q_proj",),
    keys=("**.self_attn.k_proj",),
    values=("**.self_attn.v_proj",),
    fused_qkv=("**.self_attn.qkv_proj",),
    attention_output=("**.self_attn.o_proj", "**.self_attn.dense"),
    mlp_input=("**.layers.*.mlp",),
    mlp_output=("**.layers.*.mlp",),
    mlp_down=(
        "**.mlp.down_proj",
        "**.mlp.fc2",
        "**.mlp.c_proj",
        "**.mlp.experts.down_proj",
        "**.shared_expert*.down_proj",
    ),
    embeddings=("**.embed_tokens",),
    input_embedding=("**.embed_tokens",),
    self_attention=("**.layers.*.self_attn",),
)
OPT = Family(
    blocks=("**.layers.*",),
    attention=("**.layers.*.self_attn",),
    mlp=("**.layers.*.fc1", "**.layers.*.fc2"),
    queries=("**.self_attn.q_proj",),
    keys=("**.self_attn.k_proj",),
    values=("**.self_attn.v_proj",),
    attention_output=("**.self_attn.out_proj",),
    mlp_input=("**.layers.*.fc1",),
    mlp_output=("**.layers.*.fc2",),
    mlp_down=("**.layers.*.fc2",),
    embeddings=("**.embed_tokens",),
    input_embedding=("**.embed_tokens",),
    self_attention=("**.layers.*.self_attn",),
)
GPT2 = Family(
    blocks=("**.h.*",),
    attention=("**.h.*.attn",),
    mlp=("**.h.*.mlp",),
    fused_qkv=("**.attn.c_attn",),
    attention_output=("**.attn.resid_dropout",),
    mlp_input=("**.h.*.mlp",),
    mlp_output=("**.mlp.dropout",),
    mlp_down=("**.mlp.c_proj",),
    embeddings=("**.wte", "**.wpe"),
    input_embedding=("**.wte",),
    self_attention=("**.h.*.attn",),
)
GPTJ = replace(
    GPT2,
    queries=("**.attn.q_proj",),
    keys=("**.attn.k_proj",),
    values=("**.attn.v_proj",),
    fused_qkv=(),
    mlp_down=("**.mlp.fc_out",),
    embeddings=("**.wte",),
)
GPT_NEO = replace(
    GPT2,
    queries=("**.attn.attention.q_proj",),
    keys=("**.attn.attention.k_proj",),
    values=("**.attn.attention.v_proj",),
    fused_qkv=(),
    attention_output=("**.attn.attention.resid_dropout",),
    self_attention=("**.h.*.attn.attention",),
)
FALCON = Family(
    blocks=("**.h.*",),
    attention=("**.h.*.self_attention",),
    mlp=("**.h.*.mlp",),
    fused_qkv=("**.self_attention.query_key_value",),
    attention_output=("**.self_attention.dense",),
    mlp_input=("**.h.*.mlp",),
    mlp_output=("**.mlp.dense_4h_to_h",),  # BLOOM's MLP adds the residual itself
    mlp_down=("**.mlp.dense_4h_to_h",),
    embeddings=("**.word_embeddings",),
    input_embedding=("**.word_embeddings",),
    self_attention=("**.h.*.self_attention",),
    fused="grouped",
)
GPT_NEOX = Family(
    blocks=("**.layers.*",),
    attention=("**.layers.*.attention",),
    mlp=("**.layers.*.mlp",),
    fused_qkv=("**.attention.query_key_value",),
    attention_output=("**.layers.*.post_attention_dropout",),
    mlp_input=("**.layers.*.mlp",),
    mlp_output=("**.layers.*.post_mlp_dropout",),
    mlp_down=("**.mlp.dense_4h_to_h",),
    embeddings=("**.embed_in",),
    input_embedding=("**.embed_in",),
    self_attention=("**.layers.*.attention",),
    fused="grouped",
)
BERT = Family(
    blocks=("**.encoder.layer.*",),
    attention=("**.layer.*.attention",),
    mlp=("**.layer.*.intermediate", "**.layer.*.output"),
    queries=("**.attention.self.query",),
    keys=("**.attention.self.key",),
    values=("**.attention.self.value",),
    attention_output=("**.attention.output.dropout",),
    mlp_input=("**.layer.*.intermediate.dense",),
    mlp_output=("**.layer.*.output.dropout",),
    mlp_down=("**.layer.*.output.dense",),
    mlp_norm=("**.layer.*.output.LayerNorm",),
    embeddings=("**.embeddings.*_embeddings",),
    input_embedding=("**.embeddings.word_embeddings",),
    self_attention=("**.layer.*.attention.self",),
)
ROBERTA = replace(BERT, shifts_positions=False)  # its positions begin after that of padding
DEBERTA = replace(
    BERT,
    queries=("**.attention.self.query_proj",),
    keys=("**.attention.self.key_proj",),
    values=("**.attention.self.value_proj",),
    shifts_positions=False,
    apart=(
        "**.encoder",
    ),  # distances are projected once for all rows, by the layers of queries and keys
    uncalled=("**.encoder.rel_embeddings",),
)
DISTILBERT = Family(
    blocks=("**.transformer.layer.*",),
    attention=("**.layer.*.attention",),
    mlp=("**.layer.*.ffn",),
    queries=("**.attention.q_lin",),
    keys=("**.attention.k_lin",),
    values=("**.attention.v_lin",),
    attention_output=("**.attention.out_lin",),
    mlp_input=("**.layer.*.ffn",),
    mlp_output=("**.ffn.dropout",),
    mlp_down=("**.ffn.lin2",),
    mlp_norm=("**.layer.*.output_layer_norm",),
    embeddings=("**.embeddings.*_embeddings",),
    input_embedding=("**.embeddings.word_embeddings",),
    self_attention=("**.layer.*.attention",),
    shifts_positions=False,
)
MODERNBERT = Family(
    blocks=("**.layers.*",),
    attention=("**.layers.*.attn",),
    mlp=("**.layers.*.mlp",),
    fused_qkv=("**.attn.Wqkv",),
    attention_output=("**.attn.out_drop",),
    mlp_input=("**.layers.*.mlp",),
    mlp_output=("**.layers.*.mlp",),
    mlp_down=("**.mlp.Wo",),
    embeddings=("**.embeddings.tok_embeddings",),
    input_embedding=("**.embeddings.tok_embeddings",),
    self_attention=("**.layers.*.attn",),
)
T5 = Family(
    blocks=("**.encoder.block.*", "**.decoder.block.*"),
    attention=("**.SelfAttention", "**.EncDecAttention"),
    mlp=("**.DenseReluDense",),
    queries=("**.SelfAttention.q", "**.EncDecAttention.q"),
    keys=("**.SelfAttention.k", "**.EncDecAttention.k"),
    values=("**.SelfAttention.v", "**.EncDecAttention.v"),
    attention_output=("**.layer.0.dropout", "**.decoder.block.*.layer.1.dropout"),
    mlp_input=("**.DenseReluDense",),
    mlp_output=("**.encoder.block.*.layer.1.dropout", "**.decoder.block.*.layer.2.dropout"),
    mlp_down=("**.DenseReluDense.wo",),
    embeddings=("**.embed_tokens",),
    input_embedding=("**.encoder.embed_tokens",),
    self_attention=("**.SelfAttention",),
    cross_attention=("**.EncDecAttention",),
    shifts_positions=False,
)
BART = Family(
    blocks=("**.encoder.layers.*", "**.decoder.layers.*"),
    attention=("**.self_attn", "**.encoder_attn"),
    mlp=("**.layers.*.fc1", "**.layers.*.fc2"),
    queries=("**.self_attn.q_proj", "**.encoder_attn.q_proj"),
    keys=("**.self_attn.k_proj", "**.encoder_attn.k_proj"),
    values=("**.self_attn.v_proj", "**.encoder_attn.v_proj"),
    attention_output=("**.self_attn.out_proj", "**.encoder_attn.out_proj"),
    mlp_input=("**.layers.*.fc1",),
    mlp_output=("**.layers.*.fc2",),
    mlp_down=("**.layers.*.fc2",),
    mlp_norm=("**.layers.*.final_layer_norm",),
    embeddings=("**.embed_tokens",),
    input_embedding=("**.encoder.embed_tokens",),
    self_attention=("**.self_attn",),
    cross_attention=("**.encoder_attn",),
    shifts_positions=False,
)
MBART = replace(BART, mlp_norm=())  # its final_layer_norm stands before the feed-forward
VIT = Family(
    blocks=("**.layers.*", "**.encoder.layer.*"),
    attention=("**.layers.*.attention", "**.layer.*.attention"),
    mlp=("**.layers.*.mlp", "**.layer.*.mlp"),
    queries=("**.attention.q_proj",),
    keys=("**.attention.k_proj",),
    values=("**.attention.v_proj",),
    attention_output=("**.attention.o_proj",),
    mlp_input=("**.layers.*.mlp", "**.layer.*.mlp"),
    mlp_output=("**.layers.*.mlp", "**.layer.*.mlp"),
    mlp_down=("**.mlp.fc2", "**.mlp.weights_out"),
    input_embedding=("**.embeddings",),
    self_attention=("**.layers.*.attention", "**.layer.*.attention"),
    shifts_positions=False,
)
CLIP = Family(
    blocks=("**.encoder.layers.*",),
    attention=("**.layers.*.self_attn",),
    mlp=("**.layers.*.mlp",),
    queries=("**.self_attn.q_proj",),
    keys=("**.self_attn.k_proj",),
    values=("**.self_attn.v_proj",),
    attention_output=("**.self_attn.out_proj",),
    mlp_input=("**.layers.*.mlp",),
    mlp_output=("**.layers.*.mlp",),
    mlp_down=("**.layers.*.mlp.fc2",),
    embeddings=("**.token_embedding", "**.position_embedding"),
    input_embedding=("**.text_model.embeddings.token_embedding", "**.vision_model.embeddings"),
    self_attention=("**.layers.*.self_attn",),
    shifts_positions=False,
)
CLIP_TEXT = replace(CLIP, input_embedding=("**.embeddings.token_embedding",))
CLIP_VISION = replace(CLIP, input_embedding=("**.embeddings",))
GENERIC = Family(
    blocks=("**.layers.*", "**.h.*", "**.blocks.*", "**.block.*", "**.encoder.layer.*"),
    attention=("**.*attn", "**.*attention", "**.*Attention"),
    mlp=("**.mlp", "**.ffn", "**.feed_forward"),
    queries=("**.q_proj", "**.query", "**.wq"),
    keys=("**.k_proj", "**.key", "**.wk"),
    values=("**.v_proj", "**.value", "**.wv"),
    fused_qkv=("**.qkv", "**.qkv_proj", "**.query_key_value", "**.c_attn"),
    mlp_input=("**.mlp", "**.ffn", "**.feed_forward"),
    mlp_down=("**.down_proj", "**.fc2", "**.w2"),
    embeddings=("**.embed_tokens", "**.wte", "**.word_embeddings"),
    input_embedding=("**.embed_tokens", "**.wte", "**.word_embeddings"),
)

FAMILIES = MappingProxyType(
    {
        **dict.fromkeys(("gpt2", "gpt_bigcode"), GPT2),
        "gptj": GPTJ,
        "gpt_neo": GPT_NEO,
        "gpt_neox": GPT_NEOX,
        **dict.fromkeys(("falcon", "bloom"), FALCON),
        "opt": OPT,
        **dict.fromkeys(("bert", "electra"), BERT),
        **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ROBERTA),
        "deberta-v2": DEBERTA,
        "distilbert": DISTILBERT,
        "modernbert": MODERNBERT,
        **dict.fromkeys(("t5", "mt5", "umt5"), T5),
        **dict.fromkeys(("bart", "marian"), BART),
        **dict.fromkeys(("mbart", "pegasus", "m2m_100", "blenderbot"), MBART),
        **dict.fromkeys(("vit", "deit", "dinov2"), VIT),
        "clip": CLIP,
        **dict.fromkeys(("clip_text_model", "siglip_text_model"), CLIP_TEXT),
        **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), CLIP_VISION),
        "siglip": CLIP,
        **dict.fromkeys(
            (
                "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2",
                "gemma3_text", "phi", "phi3", "olmo", "olmo2", "smollm3", "granite", "starcoder2", "cohere",
                "stablelm",
            ),
            LLAMA,
        ),
    }
)  # fmt: skip


def family_of(config: Any) -> Family:
    """The family that a transformers config (or None) describes."""
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type, GENERIC) if model_type else GENERIC
    if model_type == "opt" and not config.do_layer_norm_before:
        return replace(family, mlp_norm=("**.layers.*.final_layer_norm",))
    if model_type == "gpt_bigcode" and not config.multi_query:
        return replace(family, fused="grouped")
    return family


HEADS = (
    "lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "head", "pre_classifier",
    "classification_head", "vocab_transform", "vocab_projector",
)  # fmt: skip
"""Usual names of output heads, at the top of a model."""

ROLES = ("all-linear", *GENERIC.roles, "norms", "head", "all")
"""Words that selectors understand beside names, globs and regular expressions."""
