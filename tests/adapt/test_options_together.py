"""Options of LoRA and its variants together: each does what it does alone, or the pair is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests.laws.cells import shaken
from tests.tiny import CASES, VOCABULARY, output
from trimtab.adapt.export import exported
from trimtab.adapt.files import CONFIG, load, save
from trimtab.adapt.routed import routed
from trimtab.errors import ConfigError, NotMergeableError, TargetError, UnsupportedError

CALL = (5, 9)
START = 4


def text() -> Tensor:
    """Two rows; the first one has the tokens of the invocation at `START`."""
    ids = torch.randint(10, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    ids[0, START : START + 2] = torch.tensor(CALL)
    return ids


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return output(model, {"input_ids": text()})


def built(method: str, name: str = "llama") -> tuple[nn.Module, tt.Adapter]:
    model = CASES[name].model(torch.float64)
    adapter = tt.attach(model, tt.method(method), "a")
    shaken(adapter)
    return model.eval(), adapter


def again(adapter: tt.Adapter, name: str = "llama") -> Tensor:
    """The output with this adapter on the same base, attached anew."""
    model = CASES[name].model(torch.float64).eval()
    tt.attach(model, adapter)
    return logits(model)


# -- what waits for its invocation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", "lora_bias=true"),
        ("gpt2", "lora_bias=true"),
        ("llama", "init=mica"),
        ("llama", "init=loftq"),
        ("llama", "init=pissa"),
        ("gpt2", "targets=input_embedding, tie=true"),
    ],
)
def test_an_invoked_lora_is_the_same_lora_from_its_invocation_on(name: str, options: str) -> None:
    waiting, adapter = built(f"lora(rank=3, {options}, invocation={CALL})", name)
    everywhere, plain = built(f"lora(rank=3, {options})", name)
    for key, value in plain.named().items():
        value.data.copy_(adapter.named()[key])
    found, acting = logits(waiting), logits(everywhere)
    with tt.using(waiting, None):
        bare = logits(waiting)
    assert torch.equal(found[0, :START], bare[0, :START])
    assert torch.equal(found[1], bare[1])
    assert bool(((found[0, START:] - bare[0, START:]).abs().amax(-1) > 1e-5).all())
    assert not torch.allclose(acting[0, :START], bare[0, :START])
    with pytest.raises(NotMergeableError, match="merged weight acts everywhere"):
        tt.merge(waiting, "a")


class Attending(nn.Module):
    """Token ids, and a causal ``nn.MultiheadAttention`` over them."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.first = batch_first

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x if self.first else x.transpose(0, 1)
        hidden = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        y: Tensor = self.attn(x, x, x, attn_mask=hidden, need_weights=False)[0]
        return y if self.first else y.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_invocation_holds_inside_an_attention_of_torch(
    batch_first: bool, tmp_path: Path
) -> None:
    model = Attending(batch_first=batch_first).eval()
    with torch.no_grad():
        bare = model(text())
        adapter = tt.attach(model, tt.LoRA(rank=2, targets="attn", invocation=CALL), "a")
        shaken(adapter)
        found = model(text())
    torch.testing.assert_close(found[0, :START], bare[0, :START], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], bare[1], rtol=1e-5, atol=1e-6)
    assert bool(((found[0, START:] - bare[0, START:]).abs().amax(-1) > 1e-4).all())
    adapter.save(tmp_path / "a")
    assert '"peft_type": "TRIMTAB_LORA"' in (tmp_path / "a" / CONFIG).read_text()  # PEFT has none


# -- starts that are meant beside another base ---------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "velora(rank=4, groups=4, init=loftq)",
        "monteclora(rank=4, samples=2, init=loftq)",
        "velora(rank=4, groups=4, init=pissa)",
        "lora(rank=4, lora_bias=true, init=loftq)",
    ],
)
def test_a_variant_begins_beside_another_base_as_lora_does(method: str, tmp_path: Path) -> None:
    model, adapter = built(method)
    expected = logits(model)
    with tt.using(model, None):
        assert not torch.allclose(logits(model), expected)
    torch.testing.assert_close(logits(tt.merge(model, "a")), expected)
    save(adapter, tmp_path / "a")
    assert torch.equal(again(load(tmp_path / "a")), expected)
    plain = exported(adapter)
    assert plain.method.kind == "lora"
    torch.testing.assert_close(again(plain), expected)
    save(plain, tmp_path / "plain")
    torch.testing.assert_close(again(load(tmp_path / "plain")), expected)


def test_tied_ends_both_have_the_other_base() -> None:
    model, _ = built("lora(rank=3, init=loftq, targets=input_embedding, tie=true)", "gpt2")
    expected = logits(model)
    merged = tt.merge(model, "a")
    torch.testing.assert_close(logits(merged), expected)
    torch.testing.assert_close(merged.lm_head.weight, merged.transformer.wte.weight)
    change = merged.lm_head.weight - CASES["gpt2"].model(torch.float64).lm_head.weight
    assert torch.linalg.matrix_rank(change) > 3


# -- refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        *[(f"kasa(init={i})", "begins at zero") for i in ("loftq", "pissa", "olora", "corda")],
        ("kasa(init='loftq(stored=true)')", "begins at zero"),
        ("qalora(init=loftq)", "begins in its own way"),
        ("bdlora(init=corda)", "begins in its own way"),
        ("dora(init=loftq)", "computes beside another weight"),
        ("adalora(init=loftq)", "begins in its own way"),
        ("velora(init=mica)", "trains both factors"),
        ("lora(bits=8, init=loftq)", "would move the start"),
    ],
)
def test_two_starts_of_one_base_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tt.method(method)


def test_an_embedding_has_no_bias_of_b_at_its_tied_head_either() -> None:
    model = CASES["gpt2"].model(torch.float64)
    with pytest.raises(TargetError, match="an embedding has no bias"):
        tt.attach(model, tt.LoRA(lora_bias=True, targets=("lm_head",), tie=True), "a")


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"invocation": CALL}, {"init": "loftq"}])
def test_tokens_choose_among_plain_loras_alone(options: dict[str, Any]) -> None:
    model = CASES["llama"].model(torch.float64)
    adapter = tt.attach(model, tt.LoRA(rank=4, **options), "a")
    with pytest.raises(UnsupportedError, match="no plain LoRA"):
        routed([adapter])


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"init": "mica"}, True),
        ({"init": "mica", "invocation": CALL}, False),
        ({"init": "mica", "lora_bias": True}, False),
        ({"init": "loftq"}, True),
        ({"init": "loftq", "lora_bias": True}, False),
        ({"invocation": CALL, "lora_bias": True}, True),
    ],
)
def test_what_peft_refuses_together_is_not_written_for_it(
    options: dict[str, Any], known: bool, tmp_path: Path
) -> None:
    model = CASES["llama"].model(torch.float64)
    adapter = tt.attach(model, tt.LoRA(rank=4, **options), "a")
    shaken(adapter)
    save(adapter, tmp_path / "a")
    assert ('"peft_type": "LORA"' in (tmp_path / "a" / CONFIG).read_text()) is known
    assert torch.equal(again(load(tmp_path / "a")), logits(model.eval()))
