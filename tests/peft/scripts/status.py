"""What a model is made of: status of layers and of the model, targets, counts."""

import peft

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
config = peft.LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], task_type=peft.TaskType.CAUSAL_LM
)
model = peft.get_peft_model(kit.loud(tiny.llama()), config, adapter_name="one")
model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["q_proj"]))
layers = model.get_layer_status()
whole = model.get_model_status()
layer = model.base_model.model.model.layers[0].self_attn.q_proj

results = {
    "layers": [
        [s.name, s.module_type, s.enabled, sorted(s.active_adapters), sorted(s.available_adapters)]
        for s in layers
    ],
    "model": [whole.base_model_type, whole.adapter_model_type, whole.num_adapter_layers, whole.trainable_params,
              whole.total_params, whole.enabled],
    "functions": [peft.get_model_status(model).num_adapter_layers, len(peft.get_layer_status(model))],
    "targets": sorted(model.targeted_module_names),
    "layer": [layer.scaling, layer.r, sorted(layer.lora_A), layer.active_adapters],
    "shape": list(layer.lora_A["one"].weight.shape),
    "is": [isinstance(model, peft.PeftModel), isinstance(model.peft_config["one"], peft.PeftConfig)],
    "type": [model.peft_config["one"].peft_type.name, type(model).__name__],
    "device": str(model.device),
}  # fmt: skip
