"""Named entities with a BERT-like model: LoRA on all linear layers of the encoder, and labels of -100."""

from peft import LoraConfig, TaskType, get_peft_model

# the rest is the same under both packages
import torch
from transformers import AutoModelForTokenClassification, BertConfig

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = AutoModelForTokenClassification.from_config(
    BertConfig(**{**tiny.SMALL_ENCODER, "num_labels": 5})
)
config = LoraConfig(
    task_type=TaskType.TOKEN_CLS,
    r=4,
    lora_alpha=16,
    lora_dropout=0.0,
    bias="none",
    target_modules=["query", "key", "value", "dense"],
)
model = get_peft_model(kit.loud(model), config)
names = kit.filled(model)

batches = []
for seed in range(3):
    batch = kit.padded(4, 8, seed)
    labels = (batch["input_ids"] % 5).masked_fill(batch["attention_mask"] == 0, -100)
    batches.append({**batch, "labels": labels})
losses = kit.trained(model.train(), batches, lr=0.1)
with torch.no_grad():
    found = model.eval()(**batches[0]).logits.argmax(-1)

results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "found": found.tolist(),
    "class": type(model).__name__,
}
