"""Architecture families: where blocks, attention, MLP, norms and embeddings are, by module paths.

Patterns are globs over whole paths (``*`` stays within a segment, ``**`` crosses them); a family lists
what its architecture has, and nothing else. An architecture that no family describes is read by the
``GENERIC`` rules, which know the usual names only; ask for roles that it lacks and an error says so.
Keys are the ``model_type`` of a transformers config.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Family:
    """Globs by role. ``attention`` and ``mlp`` name the sub-layer modules; their linears are found inside."""

    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    fused_qkv: tuple[str, ...] = ()
    attention_output: tuple[str, ...] = ()
    mlp_output: tuple[str, ...] = ()
    mlp_down: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    input_embedding: tuple[str, ...] = ()
    self_attention: tuple[str, ...] = ()
    cross_attention: tuple[str, ...] = ()
    shifts_positions: bool = True


LLAMA = Family(
    blocks=("**.layers.*",),
    attention=("**.layers.*.self_attn",),
    mlp=("**.layers.*.mlp", "**.layers.*.block_sparse_moe", "**.layers.*.feed_forward"),
    queries=("**.self_attn.q_proj",),
    keys=("**.self_attn.k_proj",),
    values=("**.self_attn.v_proj",),
    fused_qkv=("**.self_attn.qkv_proj",),
    attention_output=("**.self_attn.o_proj", "**.self_attn.dense"),
    mlp_output=("**.layers.*.mlp",),
    mlp_down=(
        "**.mlp.down_proj",
        "**.mlp.fc2",
        "**.mlp.experts.down_proj",
        "**.shared_expert*.down_proj",
    ),
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
    mlp_output=("**.mlp.dropout",),
    mlp_down=("**.mlp.c_proj",),
    embeddings=("**.wte", "**.wpe"),
    input_embedding=("**.wte",),
    self_attention=("**.h.*.attn",),
)
BERT = Family(
    blocks=("**.encoder.layer.*",),
    attention=("**.layer.*.attention",),
    mlp=("**.layer.*.intermediate", "**.layer.*.output"),
    queries=("**.attention.self.query",),
    keys=("**.attention.self.key",),
    values=("**.attention.self.value",),
    attention_output=("**.attention.output.dropout",),
    mlp_output=("**.layer.*.output.dropout",),
    mlp_down=("**.layer.*.output.dense",),
    embeddings=("**.embeddings.*_embeddings",),
    input_embedding=("**.embeddings.word_embeddings",),
    self_attention=("**.layer.*.attention.self",),
)
T5 = Family(
    blocks=("**.encoder.block.*", "**.decoder.block.*"),
    attention=("**.SelfAttention", "**.EncDecAttention"),
    mlp=("**.DenseReluDense",),
    queries=("**.SelfAttention.q", "**.EncDecAttention.q"),
    keys=("**.SelfAttention.k", "**.EncDecAttention.k"),
    values=("**.SelfAttention.v", "**.EncDecAttention.v"),
    attention_output=("**.layer.0.dropout", "**.decoder.block.*.layer.1.dropout"),
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
    mlp_output=("**.layers.*.fc2",),
    mlp_down=("**.layers.*.fc2",),
    embeddings=("**.embed_tokens", "**.embed_positions"),
    input_embedding=("**.encoder.embed_tokens",),
    self_attention=("**.self_attn",),
    cross_attention=("**.encoder_attn",),
    shifts_positions=False,
)
VIT = Family(
    blocks=("**.encoder.layer.*", "**.layers.*"),
    attention=("**.layer.*.attention", "**.layers.*.attention"),
    mlp=("**.layer.*.intermediate", "**.layer.*.output", "**.layers.*.mlp"),
    queries=("**.attention.attention.query", "**.attention.q_proj"),
    keys=("**.attention.attention.key", "**.attention.k_proj"),
    values=("**.attention.attention.value", "**.attention.v_proj"),
    attention_output=("**.attention.output.dropout", "**.attention.o_proj"),
    mlp_output=("**.layer.*.output.dropout", "**.layers.*.mlp"),
    mlp_down=("**.layer.*.output.dense", "**.mlp.fc2"),
)
GENERIC = Family(
    blocks=("**.layers.*", "**.h.*", "**.blocks.*", "**.block.*", "**.encoder.layer.*"),
    attention=("**.*attn", "**.*attention", "**.*Attention"),
    mlp=("**.mlp", "**.ffn", "**.feed_forward"),
    queries=("**.q_proj", "**.query", "**.wq"),
    keys=("**.k_proj", "**.key", "**.wk"),
    values=("**.v_proj", "**.value", "**.wv"),
    fused_qkv=("**.qkv", "**.qkv_proj", "**.query_key_value", "**.c_attn"),
    mlp_down=("**.down_proj", "**.fc2", "**.w2"),
    embeddings=("**.embed_tokens", "**.wte", "**.word_embeddings"),
    input_embedding=("**.embed_tokens", "**.wte", "**.word_embeddings"),
)

FAMILIES = MappingProxyType(
    {
        "gpt2": GPT2,
        "bert": BERT,
        "roberta": BERT,
        "electra": BERT,
        "t5": T5,
        "mt5": T5,
        "bart": BART,
        "mbart": BART,
        "vit": VIT,
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

ROLES = (
    "all-linear", "attention", "mlp", "queries", "keys", "values", "fused_qkv", "attention_output", "mlp_output",
    "mlp_down", "embeddings", "input_embedding", "self_attention", "cross_attention",
    "norms", "head", "all",
)  # fmt: skip
"""Words that selectors understand beside names, globs and regular expressions."""
