"""DoRA: weights with a magnitude of their own, trained, saved, loaded and merged."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
config = LoraConfig(
    r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True, task_type="CAUSAL_LM"
)
model = get_peft_model(kit.loud(tiny.llama()), config)
names = sorted(name for name, p in model.named_parameters() if p.requires_grad)
with torch.no_grad():  # the magnitudes stay what they are: the norms of the weights
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.copy_(kit.draw(name, parameter, 0.1))

batches = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 8, seed)} for seed in range(3)]
losses = kit.trained(model.train(), batches)
model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(kit.loud(tiny.llama()), folder)
    outputs = [
        kit.total(loaded(**kit.padded())),
        kit.total(model.merge_and_unload()(**kit.padded())),
    ]

results = {
    "trained": [loaded.get_nb_trainable_parameters(), loaded.peft_config["default"].use_dora],
    "names": names,
    "losses": losses,
    "outputs": outputs,
}
