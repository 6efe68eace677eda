"""A convolutional network: LoRA on its convolutions, its head trained in full."""

from peft import LoraConfig, get_peft_model

# the rest is the same under both packages
import torch
from torch import Tensor, nn

from tests.peft import script_kit as kit


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=r".*\.conv\d", modules_to_save=["head"])
model = get_peft_model(ConvNet(), config)
names = kit.filled(model)
shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
labels = torch.tensor([0, 1, 2, 3])
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
losses = []
for _ in range(4):
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
with torch.no_grad():
    before = kit.total(model(x))
    after = kit.total(model.merge_and_unload()(x))
results = {"names": names, "shapes": shapes, "losses": losses, "merged": [before, after]}
