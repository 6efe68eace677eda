"""Imports from inside the package, as users write them."""

from __future__ import annotations

import trimtab.peft as peft
from tests import tiny


def test_paths_that_users_import() -> None:
    from trimtab.peft import tuners
    from trimtab.peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from trimtab.peft.peft_model import PeftModelForCausalLM
    from trimtab.peft.tuners import IA3Config, LoraModel
    from trimtab.peft.tuners.lora import LoraConfig, LoraLayer
    from trimtab.peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.IA3] is IA3Config is peft.IA3Config
    assert tuners.LoHaConfig is peft.LoHaConfig and LoraConfig is peft.LoraConfig
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.llama(), config)
    model.add_adapter("other", IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    assert isinstance(model, PeftModelForCausalLM) and isinstance(
        model.base_model, BaseTuner | LoraModel
    )
    adapted = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    lora = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == {"q_proj", "embed_tokens", "v_proj"} and lora == {"q_proj", "embed_tokens"}
