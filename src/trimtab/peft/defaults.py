"""Which modules PEFT adapts where ``target_modules`` is not given: facts about models, by their type.

Tables are written as rows ``names: model types``; those of other methods say only what differs from LoRA's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from trimtab.adapt.tree import anatomy_of
from trimtab.errors import ConfigError, TargetError
from trimtab.peft.errors import PeftWarning
from trimtab.peft.types import PeftType

Names = Sequence[str] | str
Table = dict[str, Names]


def _table(text: str) -> Table:
    """``names: model types`` a line; a name that is no word is a regular expression."""
    found: Table = {}
    for line in text.split("\n"):
        names, _, kinds = line.strip().rpartition(": ")
        whole: Names = names if "*" in names else names.split()
        found |= dict.fromkeys(kinds.split(), whole)
    return found


def _changed(base: Mapping[str, Names], without: str = "", text: str = "") -> Table:
    """A table without some model types, and with these rows."""
    left = {kind: names for kind, names in base.items() if kind not in without.split()}
    return left | (_table(text) if text else {})


LORA = _table(
    r"""q v: t5 mt5
    c_attn: gpt2 gpt_bigcode
    query_key_value: bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon
    q v q_proj v_proj: blip-2
    q_proj v_proj: bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3
    query value: bert roberta xlm-roberta electra layoutlm
    query_proj value_proj: deberta-v2
    in_proj: deberta
    Wqkv: mpt
    c_proj c_attn: btlm
    qkv_proj: codegen
    q_proj v_proj fc1 fc2: phi
    .*language_model\..*\.(q_proj|v_proj): gemma4
    q_proj k_proj v_proj o_proj: nemotron_h
    key value receptance output: rwkv
    r_proj k_proj v_proj o_proj key value: rwkv7"""
)
ADALORA = _changed(
    LORA,
    "blip-2 xlm-roberta electra layoutlm chatglm mpt RefinedWebModel RefinedWeb falcon btlm codegen mistral mixtral "
    "stablelm phi rwkv rwkv7",
    """q k v o wi wo: t5
    q k v o wi_0 wi_1 wo: mt5
    q_proj k_proj v_proj out_proj fc1 fc2: bart opt
    query key value dense: roberta
    query_proj key_proj value_proj dense: deberta-v2""",
)
IA3 = _table(
    """k v wo: t5
    k v wi_1: mt5
    c_attn mlp.c_proj: gpt2 gpt_bigcode
    query_key_value mlp.dense_4h_to_h: bloom
    query_key_value dense_4h_to_h: gpt_neox RefinedWebModel RefinedWeb falcon
    key value output.dense: bert roberta
    key_proj value_proj output.dense: deberta-v2
    in_proj output.dense: deberta
    q_proj k_proj fc2: opt
    q_proj v_proj fc2: bart phi
    q_proj v_proj fc_out: gptj
    q_proj v_proj c_proj: gpt_neo
    k_proj v_proj down_proj: llama mistral
    q_proj v_proj down_proj: llama4 gemma gemma2 gemma3_text qwen2 qwen3
    k_proj v_proj w2: mixtral"""
)
FEEDFORWARD = _table(
    """wo: t5
    mlp.c_proj: gpt2 gpt_bigcode
    mlp.dense_4h_to_h: bloom
    dense_4h_to_h: gpt_neox RefinedWebModel RefinedWeb falcon
    output.dense: bert roberta deberta-v2 deberta
    fc2: opt bart phi
    fc_out: gptj
    c_proj: gpt_neo
    down_proj: llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3
    w2: mixtral"""
) | {"mt5": []}
"""Of the targets of (IA)³, those whose input is rescaled."""
NORMS = _table(
    """layer_norm final_layer_norm: t5 mt5
    self_attn_layer_norm encoder_attn_layer_norm final_layer_norm: bart
    ln_1 ln_2 ln_f: gpt2
    ln_1 ln_f: gptj
    input_layernorm post_attention_layernorm ln_f: bloom falcon
    input_layernorm post_attention_layernorm norm: llama mistral gemma
    input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm: gemma2
    input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm: gemma3_text
    input_layernorm final_layernorm: phi
    post_attention_layernorm: qwen2 qwen3
    layernorm LayerNorm final_layer_norm self_attn_layer_norm: blip-2
    multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head: llava"""
)
_QV_PHI = _changed(LORA, text="q_proj v_proj: phi")
TABLES: Mapping[str, Table] = {
    PeftType.ADALORA: ADALORA,
    PeftType.IA3: IA3,
    PeftType.LN_TUNING: NORMS,
    PeftType.FOURIERFT: _changed(LORA, text="mlp.c_proj: gpt2 gpt_bigcode"),
    PeftType.VERA: _QV_PHI,
    PeftType.SHIRA: _QV_PHI,
}
"""By method; LoRA's is that of all others."""
_ROLES = {PeftType.LN_TUNING: (("norms",),)}
"""Our own choice for other models: the first of these roles that the model has."""


def model_type(model: nn.Module) -> str:
    """What transformers calls the architecture; empty where it is none of its own."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def default_targets(peft_type: str, model: nn.Module) -> Names:
    """The default targets of a method in a model: PEFT's, or our own, with a warning.

    Raises:
        TargetError: nothing is known of such a model.
    """
    kind = model_type(model)
    table = TABLES.get(peft_type, LORA)
    if kind in table:
        return table[kind]
    anatomy = anatomy_of(model)
    for roles in _ROLES.get(PeftType(peft_type), (("queries", "values"), ("fused_qkv",))):
        if all(anatomy.role(role) for role in roles):
            warn_own(model, " and ".join(roles))
            return roles
    raise TargetError(
        f"there are no default target_modules for {kind or type(model).__name__!r}; name them, "
        "for example target_modules='all-linear'."
    )


def warn_own(model: nn.Module, choice: str) -> None:
    """Say which default is our own."""
    warnings.warn(
        f"PEFT has no default target_modules for models of type {model_type(model)!r}; Trimtab takes {choice}. "
        "Name target_modules to choose.",
        category=PeftWarning,
        stacklevel=3,
    )


def default_feedforward(model: nn.Module) -> Names:
    """Of the targets of (IA)³, those whose input PEFT rescales where ``feedforward_modules`` is not given.

    Raises:
        ConfigError: PEFT has no such default for this model.
    """
    kind = model_type(model)
    if kind not in FEEDFORWARD:
        raise ConfigError(
            f"IA3Config: there is no default of feedforward_modules for {kind or type(model).__name__!r}; name those "
            "of target_modules whose input is to be rescaled, or give [] for none."
        )
    return FEEDFORWARD[kind]
