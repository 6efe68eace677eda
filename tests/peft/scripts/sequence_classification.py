"""Sentence pairs with a BERT-like model: LoRA on queries and values; the classifier is trained in full."""

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)

# the rest is the same under both packages
import tempfile

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = kit.loud(tiny.bert())
config = LoraConfig(
    task_type=TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.0
)
model = get_peft_model(model, config)
names = kit.filled(model)

batches = [{**kit.padded(4, 8, seed), "labels": torch.tensor([0, 1, 2, seed])} for seed in range(3)]
model.train()
losses = kit.trained(model, batches)
model.eval()
right = 0
with torch.no_grad():
    for batch in batches:
        predictions = model(**batch).logits.argmax(-1)
        right += int((predictions == batch["labels"]).sum())

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stored = PeftConfig.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(kit.loud(tiny.bert()), folder)
    with torch.no_grad():
        again = kit.total(loaded(**kit.padded()))

results = {
    "printed": kit.printed(model),
    "names": names,
    "keys": {key: list(value.shape) for key, value in get_peft_model_state_dict(model).items()},
    "losses": losses,
    "accuracy": right / 12,
    "stored": [str(getattr(stored.task_type, "value", stored.task_type)), type(loaded).__name__],
    "saved in full": "classifier" in loaded.modules_to_save,
    "loaded": again,
}
