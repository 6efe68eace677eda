"""Prompt tuning of a decoder, the prompt begun from a text; generation, saving and loading."""

from peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

# the rest is the same under both packages
import tempfile

import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as place:
    kit.tokenizer().save_pretrained(place)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        num_virtual_tokens=6,
        prompt_tuning_init_text="the sea is deep and a ship turns",
        tokenizer_name_or_path=place,
    )
    model = get_peft_model(kit.loud(tiny.llama(vocab_size=400)), config)

batches = [{**kit.padded(4, 8, seed), "labels": kit.ids(4, 8, seed)} for seed in range(3)]
for batch in batches:
    batch["labels"][:, :2] = -100  # the question is not learnt
losses = kit.trained(model.train(), batches, lr=0.3)
model.eval()
prompts = {"input_ids": kit.ids(2, 6, 1), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
with torch.no_grad():
    generated = model.generate(**prompts, max_new_tokens=6, do_sample=False)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(kit.loud(tiny.llama(vocab_size=400)), folder)
with torch.no_grad():
    again = loaded.generate(**prompts, max_new_tokens=6, do_sample=False)

results = {
    "printed": kit.printed(model),
    "losses": losses,
    "generated": [generated.tolist(), again.tolist()],
    "virtual tokens": loaded.peft_config["default"].num_virtual_tokens,
}
