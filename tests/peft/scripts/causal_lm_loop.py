"""Fine-tuning a Llama-like model by hand: a loop, generation, saving the adapter and loading it again."""

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from torch.utils.data import DataLoader

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = kit.loud(tiny.llama(vocab_size=400))
tokenizer = kit.tokenizer()

peft_config = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.0,
    bias="none",
    task_type=TaskType.CAUSAL_LM,
)
model = get_peft_model(model, peft_config)
names = kit.filled(model)


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}


loader = DataLoader(list(kit.SENTENCES), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
model.train()
losses = []
for _ in range(3):
    for batch in loader:
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())

model.eval()
prompt = tokenizer("a ship", return_tensors="pt")
with torch.no_grad():
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    base = kit.loud(tiny.llama(vocab_size=400))
    loaded = PeftModel.from_pretrained(base, folder)
with torch.no_grad():
    again = loaded(**prompt)

results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "generated": generated.tolist(),
    "loaded": kit.total(again),
    "config": [loaded.peft_config["default"].r, loaded.peft_config["default"].lora_alpha],
    "trained after loading": loaded.get_nb_trainable_parameters(),
}
