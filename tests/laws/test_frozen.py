"""Training above kept hidden states is training above blocks that are computed: every method that can be confined."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from tests.laws.cells import Cell, registered
from tests.tiny import CASES, VOCABULARY
from trimtab.adapt.contract import Method
from trimtab.data import Datum
from trimtab.engine import Engine
from trimtab.engine.frozen import Frozen
from trimtab.errors import UnsupportedError
from trimtab.optim.params import AdamParams

BEFORE_TEXT = "it puts tokens before the text, which moves positions in every block"
AT_EMBEDDING = "it acts at, or decides from, the input embeddings"
REFUSED = {
    "prefix": BEFORE_TEXT,
    "prompt": BEFORE_TEXT,
    "ptuning": BEFORE_TEXT,
    "tokens": AT_EMBEDDING,
    "spottune": AT_EMBEDDING,
    "velora": "it learns from a mean over all cells, padding included",
}
"""Methods that cannot stay above the frozen blocks, and why."""
TOP = (-1,)
MADE: dict[str, str] = {
    "union": "lora(rank=4, layers=[-1])|bitfit(layers=[-1])",
    "fusion": "fusion(parts=['pfeiffer(size=4, layers=[-1])', 'pfeiffer(size=6, layers=[-1])'])",
}
FAMILIES = (
    "gpt2", "qwen3", "qwen3-moe", "mixtral", "gemma3", "mistral", "falcon", "bloom", "classifier", "bert", "roberta",
    "deberta",
)  # fmt: skip
LAYOUTS = {"rows": False, "packed": True}


def confined(kind: str) -> Method | str:
    """A method that acts in the last block alone, where it can be told so."""
    if kind in MADE:
        return MADE[kind]
    value = Cell(kind, "llama").value()
    if kind in ("prompt", "ptuning", "tokens"):
        return value
    inner = dict(value).get("inner")
    if isinstance(inner, Method):
        return value.replace(inner=inner.replace(layers=TOP))
    return value.replace(layers=TOP)


def examples(engine: Engine, count: int = 9, seed: int = 0) -> list[Datum]:
    draw, made = random.Random(seed), []
    for number in range(count):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(4, 24))]
        if engine.labels:
            made.append(Datum.classified(ids, draw.randrange(3), origin=str(number)))
        else:
            weights = [0.0, 0.0, *(draw.choice([1.0, 0.5]) for _ in ids[2:])]
            made.append(Datum.causal(ids, weights, origin=str(number)))
    return made


def trained(
    family: str,
    method: Method | str,
    kept: Path | None,
    *,
    packed: bool | None = None,
    dtype: torch.dtype = torch.float32,
    orders: int = 1,
    **options: Any,
) -> tuple[list[list[float]], list[Tensor], int]:
    """Losses and tensors of three epochs, on as many different orders of the data; and how many texts are kept."""
    model = CASES[family].model(dtype)
    adapter = tt.attach(model, method, "a", seed=1)
    engine = Engine(model, micro_tokens=80, packed=packed, **options)
    if kept is not None:
        engine.frozen = Frozen(model, adapter, folder=kept)
    torch.manual_seed(0)
    data, losses = examples(engine), []
    for epoch in range(3):
        turn = epoch % orders
        losses.append(engine.forward_backward([*data[turn:], *data[:turn]], "a").sums)
        engine.optim_step("a", AdamParams(lr=1e-2, total=3))
    count = 0
    if engine.frozen is not None:
        count = len(engine.frozen.files)
        engine.frozen.close()
    return losses, [p.detach().clone() for p in adapter.parameters()], count


def same(family: str, method: Method | str, folder: Path, **options: Any) -> None:
    plain, want, _ = trained(family, method, None, **options)
    losses, got, count = trained(family, method, folder, **options)
    assert count == 9, "the states of every text are kept"
    assert plain == losses
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("packed", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", [kind for kind in registered() if kind not in REFUSED])
def test_kept_states_train_as_computed_ones(kind: str, packed: bool, tmp_path: Path) -> None:
    same("llama", confined(kind), tmp_path, packed=packed)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_acts_lower_is_refused(kind: str, tmp_path: Path) -> None:
    model = CASES["llama"].model(torch.float32)
    adapter = tt.attach(model, confined(kind), "a")
    with pytest.raises(UnsupportedError):
        Frozen(model, adapter, folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",
    ["lora(rank=4, dropout=0.2, layers=[-1])", "loreft(rank=3, first=2, last=1, layers=[-1])"],
    ids=["lora", "loreft"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if (family, method[:4]) == ("deberta", "lore"):
        pytest.skip(
            "its encoder is called once a row where a method looks at prompts: all is computed"
        )
    same(family, method, tmp_path, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "classifier"])
def test_other_layouts_differ_by_rounding_alone(family: str, tmp_path: Path) -> None:
    """In fp64, where rounding is small and anything else would show."""
    method = "lora(rank=4, layers=[-1])"
    options: dict[str, Any] = {"dtype": torch.float64, "orders": 3}
    plain, want, _ = trained(family, method, None, **options)
    losses, got, _ = trained(family, method, tmp_path, **options)
    assert torch.allclose(torch.tensor(plain), torch.tensor(losses), rtol=1e-9)
    for a, b in zip(want, got, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
