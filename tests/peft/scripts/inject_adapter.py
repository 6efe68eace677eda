"""The low level: adapters put into a model that stays itself, and their state dict."""

from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

# the rest is the same under both packages
import torch
from torch import Tensor, nn

from tests.peft import script_kit as kit


class DummyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.linear(self.embedding(input_ids)))  # type: ignore[no-any-return]


def made() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        lora_alpha=16, lora_dropout=0.0, r=4, bias="none", target_modules=["linear", "lm_head"]
    )
    return inject_adapter_in_model(config, DummyModel())


model = made()
names = kit.filled(model)
inputs = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
first = kit.total(model(inputs))
state = get_peft_model_state_dict(model)
other = made()
set_peft_model_state_dict(other, state)

results = {
    "class": type(model).__name__,
    "names": names,
    "keys": {key: list(value.shape) for key, value in state.items()},
    "outputs": [first, kit.total(other(inputs))],
}
