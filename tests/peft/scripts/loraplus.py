"""LoRA+: the second factors learn faster; the parameter groups, and a few steps with them."""

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

# the rest is the same under both packages
import torch

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = get_peft_model(
    kit.loud(tiny.llama()), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "v_proj"])
)
names = kit.filled(model)
optimizer = create_loraplus_optimizer(
    model=model,
    optimizer_cls=torch.optim.SGD,
    lr=0.01,
    loraplus_lr_ratio=16,
    loraplus_weight_decay=0.0,
    loraplus_lr_embedding=1e-3,
)
groups = sorted([group["lr"], len(group["params"])] for group in optimizer.param_groups)
losses = []
model.train()
for step in range(4):
    loss = model(**kit.padded(4, 8, step), labels=kit.ids(4, 8, step)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
results = {"names": names, "groups": groups, "losses": losses}
