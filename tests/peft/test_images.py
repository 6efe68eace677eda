"""Convolutions: a UNet of diffusers' own blocks where that package is installed, and one made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab.peft as ours
from tests.peft.ecosystem_kit import close, filled, learned, same

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "time_emb_proj"]


class Residual(nn.Module):
    """As in diffusers: norm, convolution, the time, norm, convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x).relu()) + self.time_emb_proj(time)[:, :, None, None]
        out: Tensor = x + self.conv2(self.norm2(h).relu())
        return out


class Attention(nn.Module):
    """Over the places of an image, after a 1×1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj_in(x).flatten(2).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h).transpose(1, 2).view_as(x)


class HandMade(nn.Module):
    """Down, attention, up, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.down, self.up = Residual(8), Residual(8)
        self.sampler = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.attention = Attention(8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = torch.outer(timestep, torch.linspace(0, 1, 8)).sin()
        skip = self.down(self.conv_in(sample), time)
        inner = self.attention(self.sampler(skip))
        whole = nn.functional.interpolate(inner, scale_factor=2.0)
        out: Tensor = self.conv_out(self.up(whole, time) + skip)
        return out


def hand_made() -> nn.Module:
    torch.manual_seed(0)
    return HandMade()


def of_diffusers() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made: nn.Module = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return made


def denoise(model: Any, seed: int) -> Tensor:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    out = model(images, torch.tensor([1.0, 20.0]))
    return (getattr(out, "sample", out) - images).square().mean()


def config(package: Any, model: nn.Module) -> Any:
    there = [n for n in TARGETS if any(p.endswith(f".{n}") for p, _ in model.named_modules())]
    return package.LoraConfig(r=4, lora_alpha=8, target_modules=there)


@pytest.mark.parametrize("make", [hand_made, of_diffusers])
def test_a_unet_trains_saves_and_merges_as_under_peft(make: Any, tmp_path: Path) -> None:
    found: list[tuple[list[float], dict[str, Tensor]]] = []
    for package in (ours, peft):
        base = make()
        model = filled(package.get_peft_model(base, config(package, base)))
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        losses = []
        for step in range(3):
            loss = denoise(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        found.append((losses, learned(model)))
        model.save_pretrained(str(tmp_path / package.__name__))
    close(found[0][0], found[1][0])
    same(found[0][1], found[1][1], atol=2e-5)
    with torch.no_grad():
        expected = denoise(model.eval(), 9)
        for package in (ours, peft):
            for folder in (ours, peft):
                again = package.PeftModel.from_pretrained(make(), str(tmp_path / folder.__name__))
                assert torch.allclose(denoise(again.eval(), 9), expected, atol=1e-5)
                merged = again.merge_and_unload()
                assert torch.allclose(denoise(merged, 9), expected, atol=1e-5)
