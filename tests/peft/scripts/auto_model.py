"""Loading by the adapter alone: the folder says which base it belongs to."""

from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as place:
    kit.loud(tiny.llama()).save_pretrained(f"{place}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{place}/base")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    names = kit.filled(model)
    model.save_pretrained(f"{place}/adapter")

    stored = PeftConfig.from_pretrained(f"{place}/adapter")
    base = AutoModelForCausalLM.from_pretrained(stored.base_model_name_or_path)
    by_hand = PeftModel.from_pretrained(base, f"{place}/adapter", is_trainable=True)
    auto = AutoPeftModelForCausalLM.from_pretrained(f"{place}/adapter")
    same_base = stored.base_model_name_or_path == f"{place}/base"

batch = kit.padded()
with torch.no_grad():
    outputs = [kit.total(each.eval()(**batch)) for each in (model, by_hand, auto)]
    generated = auto.generate(**batch, max_new_tokens=5, do_sample=False)

results = {
    "names": names,
    "outputs": outputs,
    "generated": generated.tolist(),
    "base": same_base,
    "classes": [type(by_hand).__name__, type(auto).__name__],
    "trainable": [by_hand.get_nb_trainable_parameters()[0], auto.get_nb_trainable_parameters()[0]],
}
