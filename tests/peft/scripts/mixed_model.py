"""Adapters of different methods on one model: `PeftMixedModel` with LoHa, LoKr and LoRA."""

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftMixedModel, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
batch = kit.padded()
targets = ["q_proj", "v_proj"]
model = get_peft_model(
    kit.loud(tiny.llama()),
    LoHaConfig(r=4, alpha=8, target_modules=targets),
    adapter_name="loha",
    mixed=True,
)
model.add_adapter("lokr", LoKrConfig(r=4, alpha=8, target_modules=targets))
model.add_adapter("lora", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
names = [kit.filled(model, name) for name in ("loha", "lokr", "lora")]
model.eval()

outputs = {}
for active in (
    "loha",
    "lokr",
    "lora",
    ["loha", "lokr"],
    ["lokr", "lora"],
    ["loha", "lokr", "lora"],
):
    model.set_adapter(active)
    with torch.no_grad():
        outputs[str(active)] = [kit.total(model(**batch)), model.get_nb_trainable_parameters()[0]]
with torch.no_grad():
    merged = kit.total(model.merge_and_unload()(**batch))

results = {
    "class": isinstance(model, PeftMixedModel),
    "names": names,
    "outputs": outputs,
    "merged": merged,
}
