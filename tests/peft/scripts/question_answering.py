"""Spans of text with a BERT-like model, with a bias trained beside each LoRA."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = AutoModelForQuestionAnswering.from_config(
    BertConfig(**{**tiny.SMALL_ENCODER, "num_labels": 2})
)
config = LoraConfig(task_type="QUESTION_ANS", r=4, lora_alpha=8, target_modules=["query", "value"])
model = get_peft_model(kit.loud(model), config)
names = kit.filled(model)
batches = [
    {
        **kit.padded(4, 10, seed),
        "start_positions": torch.tensor([1, 2, 3, 4]),
        "end_positions": torch.tensor([2, 4, 5, 7]),
    }
    for seed in range(2)
]
losses = kit.trained(model.train(), batches, epochs=3)
with torch.no_grad():
    out = model.eval()(**kit.padded(4, 10))

results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "spans": [out.start_logits.argmax(-1).tolist(), out.end_logits.argmax(-1).tolist()],
    "logits": [kit.total(out.start_logits), kit.total(out.end_logits)],
}
