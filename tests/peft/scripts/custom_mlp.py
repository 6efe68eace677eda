"""A model of one's own: an MLP in an ``nn.Sequential``, with a layer that is trained in full."""

from peft import LoraConfig, PeftModel, get_peft_model

# the rest is the same under both packages
import tempfile

import torch
from torch import Tensor, nn

from tests.peft import script_kit as kit


class MLP(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)  # type: ignore[no-any-return]


def made() -> MLP:
    torch.manual_seed(0)
    return MLP()


print_modules = [(name, type(module).__name__) for name, module in made().named_modules()]
config = LoraConfig(r=8, target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
model = get_peft_model(made(), config)
names = kit.filled(model)
x = torch.rand((32, 20), generator=torch.Generator().manual_seed(1))
y = (x.sum(1) > 10).long()

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
losses = []
for _ in range(5):
    loss = nn.functional.nll_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(made(), folder)
base, tuned = made(), dict(model.base_model.model.named_parameters())
unchanged = all(
    torch.equal(tuned[name], value) for name, value in base.named_parameters() if name in tuned
)
results = {
    "printed": kit.printed(model),
    "names": names,
    "losses": losses,
    "accuracy": float((model(x).argmax(-1) == y).float().mean()),
    "loaded": kit.total(loaded(x)),
    "unchanged": unchanged,
    "modules": print_modules,
}
