"""Merging an adapter into its model: for a while, for good, and saved as a plain model."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
batch = kit.padded()
model = get_peft_model(
    kit.loud(tiny.llama()), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
)
kit.filled(model)
model.eval()
with torch.no_grad():
    outputs = [kit.total(model(**batch))]
    model.merge_adapter()
    outputs.append(kit.total(model(**batch)))
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    outputs.append(kit.total(weight))
    model.unmerge_adapter()
    outputs.append(kit.total(model(**batch)))
    merged = model.merge_and_unload(safe_merge=True)
    outputs.append(kit.total(merged(**batch)))

with tempfile.TemporaryDirectory() as folder:
    merged.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    outputs.append(kit.total(plain(**batch)))
    generated = plain.generate(**batch, max_new_tokens=5, do_sample=False)

again = get_peft_model(merged, LoraConfig(r=2, target_modules=["o_proj"]))
kit.filled(again)
bare = again.unload()
with torch.no_grad():
    outputs.append(kit.total(bare(**batch)))

results = {
    "outputs": outputs,
    "keys": sorted(plain.state_dict()),
    "classes": [type(merged).__name__, type(bare).__name__],
    "generated": generated.tolist(),
}
