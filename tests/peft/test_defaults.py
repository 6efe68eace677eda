"""Default targets: PEFT's for every method and model type, and our own where PEFT has none."""

from __future__ import annotations

from typing import Any

import peft.utils.constants as theirs
import pytest
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from torch import nn

from tests import tiny
from trimtab.errors import TargetError
from trimtab.peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftType,
    get_peft_model,
)
from trimtab.peft.defaults import FEEDFORWARD, LORA, TABLES, default_targets

NAMES = {
    PeftType.LORA: "LORA", PeftType.ADALORA: "ADALORA", PeftType.IA3: "IA3", PeftType.LOHA: "LOHA",
    PeftType.LOKR: "LOKR", PeftType.OFT: "OFT", PeftType.BOFT: "BOFT", PeftType.HRA: "HRA", PeftType.VERA: "VERA",
    PeftType.RANDLORA: "RANDLORA", PeftType.FOURIERFT: "FOURIERFT", PeftType.MISS: "MISS", PeftType.SHIRA: "SHIRA",
    PeftType.HIRA: "HIRA", PeftType.LN_TUNING: "LNTUNING",
}  # fmt: skip


def sites(model: Any) -> list[str]:
    """The paths of an adapter's sites."""
    return [site.path for site in model.base_model.adapters["default"].sites]


@pytest.mark.parametrize("peft_type", NAMES)
def test_default_targets_are_those_of_peft(peft_type: PeftType) -> None:
    table = getattr(theirs, f"TRANSFORMERS_MODELS_TO_{NAMES[peft_type]}_TARGET_MODULES_MAPPING")
    assert dict(TABLES.get(peft_type, LORA)) == table


def test_so_are_the_feedforwards_of_ia3() -> None:
    assert dict(FEEDFORWARD) == theirs.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING


def test_the_attentions_of_the_llama_adapter_are_those_that_peft_names() -> None:
    """Trimtab takes the self-attention of any model; in PEFT's three families it has these names."""
    assert {k: v.target_modules for k, v in TRANSFORMERS_MODEL_CONFIG.items()} == {
        "llama": "self_attn", "mistral": "self_attn", "gpt2": "attn",
    }  # fmt: skip


def test_where_peft_has_no_default_ours_goes_by_roles_and_says_so() -> None:
    with pytest.warns(UserWarning, match="type 'vit'; Trimtab takes queries and values"):
        model = get_peft_model(tiny.vit(), LoraConfig())
    paths = sites(model)
    assert len(paths) == 4
    assert {path.rpartition(".")[2] for path in paths} == {"q_proj", "v_proj"}
    with pytest.warns(UserWarning, match="Trimtab takes norms"):
        model = get_peft_model(tiny.bert(), LNTuningConfig())
    assert len(sites(model)) == 5
    with pytest.warns(UserWarning, match="Trimtab takes keys, values and the last"):
        model = get_peft_model(tiny.vit(), IA3Config())
    assert len(sites(model)) == 6


def test_names_of_a_default_that_a_variant_lacks_are_left_out() -> None:
    """PEFT's default for T5 names ``wi``; a gated T5 has ``wi_0`` and ``wi_1``."""
    model = get_peft_model(tiny.t5(gated=True), AdaLoraConfig(total_step=10))
    ends = {p.rpartition(".")[2] for p in sites(model)}
    assert ends == {"q", "k", "v", "o", "wo"}


def test_nothing_is_guessed_of_an_unknown_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TargetError, match="no default target_modules for 'Sequential'; name them"):
        default_targets(PeftType.LORA, model)
    with pytest.raises(TargetError, match="no default target_modules"):
        get_peft_model(model, LoraConfig())
