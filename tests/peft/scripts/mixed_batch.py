"""One batch, an adapter for each row: forward and generation."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = get_peft_model(
    kit.loud(tiny.llama()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "fr"
)
model.add_adapter("de", LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
kit.filled(model, "fr")
kit.filled(model, "de")
model.eval()

batch = {"input_ids": kit.ids(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
owners = ["fr", "__base__", "de", "fr"]
with torch.no_grad():
    logits = model(**batch, adapter_names=owners).logits
    generated = model.generate(**batch, adapter_names=owners, max_new_tokens=5, do_sample=False)
    alone = []
    for row, owner in enumerate(owners):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        if owner == "__base__":
            with model.disable_adapter():
                alone.append(kit.total(model(**one)))
        else:
            model.set_adapter(owner)
            alone.append(kit.total(model(**one)))

results = {
    "together": [kit.total(row) for row in logits],
    "alone": alone,
    "generated": generated.tolist(),
}
