"""Preferences without a second model: the reference is the model with its adapter switched off."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch
from torch import Tensor, nn

from tests import tiny
from tests.peft import script_kit as kit

torch.manual_seed(0)
model = get_peft_model(
    kit.loud(tiny.llama()),
    LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
model.enable_input_require_grads()
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
names = kit.filled(model)
model.train()


def likelihood(ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None]).sum((1, 2))  # type: ignore[no-any-return]


optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
losses = []
for step in range(4):
    chosen, rejected = kit.ids(2, 8, step), kit.ids(2, 8, step + 100)
    with torch.no_grad(), model.disable_adapter():
        reference = likelihood(chosen) - likelihood(rejected)
    policy = likelihood(chosen) - likelihood(rejected)
    loss = -nn.functional.logsigmoid(0.1 * (policy - reference)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
results = {"names": names, "losses": losses, "reference": reference.tolist()}
