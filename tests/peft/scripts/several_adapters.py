"""Several adapters on one model: adding, choosing, switching off, saving, loading and deleting."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile
from pathlib import Path

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
batch = kit.padded()
base = kit.loud(tiny.llama())
with torch.no_grad():
    outputs = {"base": kit.total(base(**batch))}

model = get_peft_model(
    base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="french"
)
model.add_adapter("german", LoraConfig(r=8, lora_alpha=32, target_modules=["k_proj", "up_proj"]))
kit.filled(model, "french")
kit.filled(model, "german")
model.eval()

counts = {}
for name in ("french", "german"):
    model.set_adapter(name)
    counts[name] = [model.get_nb_trainable_parameters()[0], model.active_adapter]
    with torch.no_grad():
        outputs[name] = kit.total(model(**batch))
with model.disable_adapter(), torch.no_grad():
    outputs["disabled"] = kit.total(model(**batch))
model.base_model.set_adapter(["french", "german"])
with torch.no_grad():
    outputs["both"] = kit.total(model(**batch))

model.set_adapter("french")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    saved = sorted(p.parent.name for p in Path(folder).rglob("adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(
        kit.loud(tiny.llama()), f"{folder}/french", adapter_name="one"
    )
    loaded.load_adapter(f"{folder}/german", adapter_name="two")
for name in ("one", "two"):
    loaded.set_adapter(name)
    with torch.no_grad():
        outputs[f"loaded {name}"] = kit.total(loaded(**batch))
loaded.set_adapter("one")
loaded.delete_adapter("two")

results = {
    "counts": counts,
    "outputs": outputs,
    "saved": saved,
    "left": [sorted(loaded.peft_config), loaded.active_adapters],
    "names": [name for name, _ in model.named_parameters() if "lora" in name],
}
