"""`transformers.Trainer` with LoRA on a GPT-2-like model, whose layers are `Conv1D`."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
tokenizer = kit.tokenizer()
config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["c_attn"],
    lora_dropout=0.0,
    fan_in_fan_out=True,
    task_type="CAUSAL_LM",
)
model = get_peft_model(kit.loud(tiny.gpt2()), config)
names = kit.filled(model)

rows = [{"input_ids": row} for row in kit.ids(8, 8)]
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows[:4],  # type: ignore[arg-type]
        args=TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
            learning_rate=1e-3, warmup_steps=1, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(f"{folder}/adapter")
    files = sorted(path.name for path in Path(folder, "adapter").iterdir())
    loaded = PeftModel.from_pretrained(kit.loud(tiny.gpt2()), f"{folder}/adapter")

with torch.no_grad():
    after = kit.total(loaded(kit.ids()))
results = {
    "names": names,
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
    "eval": found["eval_loss"],
    "no base": "model.safetensors" not in files and "adapter_model.safetensors" in files,
    "loaded": after,
}
