"""The names of tasks and of methods, as PEFT's users write them."""

from __future__ import annotations

from enum import StrEnum

OURS = "TRIMTAB_"


class TaskType(StrEnum):
    """What a model is for; decides the class of its `trimtab.peft.PeftModel`."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods. A value says whose implementation it is; what PEFT calls the method on disk is `on_disk`."""

    LORA = "TRIMTAB_LORA"
    ADALORA = "TRIMTAB_ADALORA"
    IA3 = "TRIMTAB_IA3"
    LOHA = "TRIMTAB_LOHA"
    LOKR = "TRIMTAB_LOKR"
    OFT = "TRIMTAB_OFT"
    BOFT = "TRIMTAB_BOFT"
    HRA = "TRIMTAB_HRA"
    VERA = "TRIMTAB_VERA"
    RANDLORA = "TRIMTAB_RANDLORA"
    FOURIERFT = "TRIMTAB_FOURIERFT"
    MISS = "TRIMTAB_MISS"
    SHIRA = "TRIMTAB_SHIRA"
    HIRA = "TRIMTAB_HIRA"
    LN_TUNING = "TRIMTAB_LN_TUNING"
    TRAINABLE_TOKENS = "TRIMTAB_TRAINABLE_TOKENS"
    ADAPTION_PROMPT = "TRIMTAB_ADAPTION_PROMPT"
    PROMPT_TUNING = "TRIMTAB_PROMPT_TUNING"
    P_TUNING = "TRIMTAB_P_TUNING"
    PREFIX_TUNING = "TRIMTAB_PREFIX_TUNING"
    # what PEFT lacks
    ADAFIT = "TRIMTAB_ADAFIT"
    ADAPTERPLUS = "TRIMTAB_ADAPTERPLUS"
    BITFIT = "TRIMTAB_BITFIT"
    BOTTLENECK = "TRIMTAB_BOTTLENECK"
    COMPACTER = "TRIMTAB_COMPACTER"
    DIFF = "TRIMTAB_DIFF"
    DIREFT = "TRIMTAB_DIREFT"
    FULL = "TRIMTAB_FULL"
    GATED = "TRIMTAB_GATED"
    LOREFT = "TRIMTAB_LOREFT"
    MORA = "TRIMTAB_MORA"
    NOREFT = "TRIMTAB_NOREFT"
    PARALLEL = "TRIMTAB_PARALLEL"
    PFEIFFER = "TRIMTAB_PFEIFFER"
    PIGGYBACK = "TRIMTAB_PIGGYBACK"
    SPOTTUNE = "TRIMTAB_SPOTTUNE"
    UNION = "TRIMTAB_UNION"


LACKING = frozenset(
    (
        "ADAFIT", "ADAPTERPLUS", "BITFIT", "BOTTLENECK", "COMPACTER", "DIFF", "DIREFT", "FULL", "GATED", "LOREFT",
        "MORA", "NOREFT", "PARALLEL", "PFEIFFER", "PIGGYBACK", "SPOTTUNE", "UNION",
    )
)  # fmt: skip
"""The methods that PEFT lacks."""


def on_disk(peft_type: str) -> str:
    """``peft_type`` in ``adapter_config.json``: PEFT's own name where it has the method."""
    bare = str(peft_type).removeprefix(OURS)
    return OURS + bare if bare in LACKING else bare


def from_disk(name: str) -> PeftType | None:
    """The `PeftType` of a name in a file, or None where there is none."""
    bare = name.removeprefix(OURS)
    return PeftType[bare] if bare in PeftType.__members__ else None
