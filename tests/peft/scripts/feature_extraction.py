"""Sentence embeddings with a BERT-like encoder, trained by contrast."""

from peft import LoraConfig, PeftModel, TaskType, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig

from tests import tiny
from tests.peft import script_kit as kit


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    return kit.loud(AutoModel.from_config(BertConfig(**tiny.SMALL_ENCODER)))  # type: ignore[no-any-return]


def embed(encoder: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


config = LoraConfig(
    task_type=TaskType.FEATURE_EXTRACTION,
    r=8,
    lora_alpha=16,
    target_modules=["key", "query", "value"],
)
model = get_peft_model(made(), config)
names = kit.filled(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
losses = []
for step in range(4):
    queries, answers = kit.padded(4, 8, step), kit.padded(4, 10, step + 50)
    scores = embed(model, queries) @ embed(model, answers).T / 0.05
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(made(), folder)
    found = [kit.total(embed(m.eval(), kit.padded())) for m in (model, loaded)]

results = {
    "printed": kit.printed(model),
    "class": type(loaded).__name__,
    "names": names,
    "losses": losses,
    "embeddings": found,
}
