"""Text to text with a T5-like model: LoRA on queries and values of both stacks, and beam search."""

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

# the rest is the same under both packages
import tempfile

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
config = LoraConfig(
    task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.0
)
model = get_peft_model(kit.loud(tiny.t5()), config)
names = kit.filled(model)

batches = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 5, seed + 10)} for seed in range(3)]
losses = kit.trained(model.train(), batches, lr=5e-5)  # at 0.05 rounding grows a thousandfold
model.eval()
with torch.no_grad():
    greedy = model.generate(**kit.padded(2, 8), max_new_tokens=6)
    beams = model.generate(**kit.padded(2, 8), max_new_tokens=6, num_beams=3)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(kit.loud(tiny.t5()), folder)
with torch.no_grad():
    again = loaded.generate(**kit.padded(2, 8), max_new_tokens=6)

results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "generated": [greedy.tolist(), beams.tolist(), again.tolist()],
}
