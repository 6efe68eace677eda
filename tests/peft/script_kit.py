"""What the scripts in `tests/peft/scripts` share: tiny models, data, and values that only a name decides.

The scripts stand for code that people have. They import from ``peft`` on their first lines, and leave what they
found in ``results``. `filled` makes the two packages begin alike: they draw their first values differently.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.data import kit as data

VOCABULARY = tiny.VOCABULARY
SENTENCES = (
    "one two three four five",
    "the sea is deep",
    "a ship turns",
    "two lines and two spaces",
)


def loud(model: Any) -> Any:
    """The model with larger matrices: with the usual std of 0.02, all that it says is nearly alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def draw(name: str, like: Tensor, scale: float) -> Tensor:
    """Values that depend on a name and a shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (scale * torch.randn(like.shape, generator=generator)).to(like)


@torch.no_grad()
def filled(model: nn.Module, adapter: str | None = None, scale: float = 0.1) -> list[str]:
    """Give what is trained (of one adapter, if it is named) values by its name; those names."""
    names = []
    for name, parameter in model.named_parameters():
        mine = parameter.requires_grad if adapter is None else f".{adapter}." in f"{name}."
        if mine:
            plain = plain_name(name)
            parameter.copy_(draw(plain, parameter, scale))
            names.append(plain)
    return sorted(names)


def plain_name(name: str) -> str:
    """The name without the wrappers that PEFT puts around one another; see docs/from-peft.md."""
    return name.replace(".base_layer", "").replace(".token_adapter", "")


@torch.no_grad()
def filled_by_shape(model: nn.Module, scale: float = 0.3) -> list[list[int]]:
    """The same by shapes, where names differ by design (the prompt methods'); those shapes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.copy_(draw(str(tuple(parameter.shape)), parameter, scale))
    return sorted(list(parameter.shape) for parameter in trained)


def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with padding."""
    return data.byte_level()


def ids(rows: int = 4, length: int = 8, seed: int = 0) -> Tensor:
    """Random token ids (rows, length), without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def padded(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and their mask; the first row is two tokens shorter."""
    found = ids(rows, length, seed)
    mask = torch.ones_like(found)
    mask[0, -2:] = 0
    return {"input_ids": found * mask, "attention_mask": mask}


def total(values: Any) -> float:
    """One number that every value of a tensor (or of a model's logits) changes, and in which none cancel."""
    tensor = getattr(values, "logits", values).detach().double().flatten()
    return float(((tensor + 1) * torch.linspace(1, 2, len(tensor), dtype=torch.float64)).norm())


def printed(model: Any) -> str:
    """What ``print_trainable_parameters`` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model.print_trainable_parameters()
    return said.getvalue()


def trained(
    model: nn.Module, batches: list[dict[str, Tensor]], lr: float = 0.05, epochs: int = 2
) -> list[float]:
    """The usual loop; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for batch in batches_of(batches, epochs):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches_of(batches: list[dict[str, Tensor]], epochs: int) -> Iterator[dict[str, Tensor]]:
    """The batches, epoch after epoch."""
    for _ in range(epochs):
        yield from batches
