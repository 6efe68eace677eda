"""AdaLoRA: the ranks are given out anew while it trains, by `update_and_allocate` after each step."""

from peft import AdaLoraConfig, TaskType, get_peft_model

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

STEPS = 10
torch.manual_seed(0)
config = AdaLoraConfig(
    task_type=TaskType.CAUSAL_LM,
    init_r=6,
    target_r=2,
    tinit=2,
    tfinal=3,
    deltaT=1,
    beta1=0.85,
    beta2=0.85,
    lora_alpha=8,
    lora_dropout=0.0,
    target_modules=["q_proj", "v_proj"],
    orth_reg_weight=0.1,
    total_step=STEPS,
)
model = get_peft_model(kit.loud(tiny.llama()), config)
names = kit.filled(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
model.train()
losses, kept = [], []
for step in range(STEPS):
    loss = model(**kit.padded(4, 8, step), labels=kit.ids(4, 8, step)).loss
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    losses.append(loss.item())
    values = [p for name, p in model.named_parameters() if ".lora_E." in name]
    kept.append(sum(int((value != 0).sum()) for value in values))

with torch.no_grad():
    logits = kit.total(model.eval()(**kit.padded()))
results = {
    "trained": model.get_nb_trainable_parameters()[0],
    "names": names,
    "losses": losses,
    "kept": kept,
    "logits": logits,
}
