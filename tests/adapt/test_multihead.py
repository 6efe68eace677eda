"""``nn.MultiheadAttention`` with adapters inside: what torch computes with the changed weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import trimtab as tt
from tests.laws.cells import SMALL
from trimtab.adapt.attach import attach
from trimtab.adapt.contract import Method, Place
from trimtab.errors import TargetError, TrimtabError, UnsupportedError

ROWS, LENGTH, KEYS, WIDTH, HEADS = 3, 5, 4, 16, 4


class Block(nn.Module):
    """An attention whose call is free."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})

    def forward(self, x: Tensor, *rest: Tensor, **options: Any) -> Any:
        return self.attn(*((x, *rest) if rest else (x, x, x)), **options)


def shaken(
    model: nn.Module, method: Any = "lora(rank=2, alpha=4, targets='attn')", name: str = "a"
) -> tt.Adapter:
    adapter = attach(model, tt.method(method), name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def changed(adapter: tt.Adapter, model: Block) -> dict[str, Tensor]:
    """The weights of the attention with the change, as torch would be given them."""
    scale = 2.0
    found = {}
    for path, key in (
        ("attn.in_proj_weight", "in_proj_weight"),
        ("attn.out_proj", "out_proj.weight"),
    ):
        tensors = adapter.at_site(path)
        base = dict(model.attn.base_layer.named_parameters())
        weight = base.get(key, base.get(key.replace("out_proj.", "out_proj.base_layer.")))
        found[key] = weight + scale * tensors["lora_B.weight"] @ tensors["lora_A.weight"]
    return found


FLOATS = torch.randn(LENGTH, LENGTH, generator=torch.Generator().manual_seed(3))
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "added": {"attn_mask": FLOATS},
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "a mask for each head": {"attn_mask": FLOATS.expand(ROWS * HEADS, -1, -1).clone()},
}  # fmt: skip
MODULES: dict[str, dict[str, Any]] = {
    "rows first": {},
    "positions first": {"batch_first": False},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("module", MODULES)
def test_it_is_torchs_attention_with_the_changed_weights(module: str, call: str) -> None:
    options = MODULES[module]
    model = Block(**options).eval()
    bare = Block(**options).eval()
    adapter = shaken(model)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    x = x if model.attn.batch_first else x.transpose(0, 1)
    mine, weights = model(x, **CALLS[call])
    theirs, wanted = functional_call(bare.attn, changed(adapter, model), (x, x, x), CALLS[call])
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert (weights is None) == (wanted is None)
    assert weights is None or torch.allclose(weights, wanted, atol=1e-5)
    names = list(adapter.named())
    first = torch.autograd.grad(mine.square().sum(), [adapter.named()[n] for n in names])
    second = torch.autograd.grad(theirs.square().sum(), [adapter.named()[n] for n in names])
    assert all(
        torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(first, second, strict=True)
    )


def test_queries_keys_and_values_may_be_three_tensors() -> None:
    model, bare = Block().eval(), Block().eval()
    adapter = shaken(model)
    q, k, v = (torch.randn(ROWS, n, WIDTH) for n in (LENGTH, KEYS, KEYS))
    for given in ((q, k, v), (q, k, k), (q[0], k[0], v[0])):
        theirs, weights = functional_call(bare.attn, changed(adapter, model), given)
        mine = model(*given)
        assert torch.allclose(mine[0], theirs, atol=1e-5)
        assert torch.allclose(mine[1], weights, atol=1e-5)


@torch.no_grad()
def test_the_base_is_itself_when_nobody_acts_and_after_everything() -> None:
    model, bare = Block().eval(), Block().eval()
    x = torch.randn(ROWS, LENGTH, WIDTH)
    shaken(model)
    with tt.using(model, None):
        assert torch.equal(model(x)[0], bare(x)[0])
    edited = model(x)[0]
    assert not torch.allclose(edited, bare(x)[0], atol=1e-3)
    merged = tt.merge(model, "a")
    assert torch.allclose(merged(x)[0], edited, atol=1e-5)
    assert list(merged.state_dict()) == list(bare.state_dict())
    tt.detach(model, "a")
    assert list(model.state_dict()) == list(bare.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True)
    )


@torch.no_grad()
def test_rows_of_one_batch_have_their_own_adapters() -> None:
    model = Block().eval()
    shaken(model)
    shaken(model, "dora(rank=2, targets='attn')", "b")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    with tt.rows(model, ["a", "b", None]):
        mixed = model(x)[0]
    for row, name in enumerate(["a", "b", None]):
        with tt.using(model, name):
            assert torch.allclose(model(x)[0][row], mixed[row], atol=1e-5)


SETTINGS = {
    **SMALL,
    "ia3": {"kind": "ia3", "feedforward": ()},
    "vera": "vera(rank=4)",
    "oft": "oft(block=8)",
}
PROJECTIONS = ("attn.in_proj_weight", "attn.out_proj")
ACT_THERE = {
    "adalora", "bitfit", "boft", "diff", "dora", "fourierft", "hira", "hra", "ia3", "loha", "lokr", "lora", "miss",
    "mora", "norms", "oft", "piggyback", "randlora", "shira", "vera",
}  # fmt: skip
"""Methods that edit a linear layer, and so the projections."""


@pytest.mark.parametrize("kind", sorted(ACT_THERE))
@torch.no_grad()
def test_every_method_of_linear_layers_acts_where_the_projections_are_named(kind: str) -> None:
    model = Block().eval()
    method = tt.method(SETTINGS.get(kind, kind)).aimed([Place(p) for p in PROJECTIONS])
    adapter = attach(model, method, "a")
    for parameter in adapter.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    assert {site.path for site in adapter.sites} == set(PROJECTIONS)
    x = torch.randn(ROWS, LENGTH, WIDTH)
    with tt.using(model, None):
        assert torch.equal(model(x)[0], Block().eval()(x)[0])
    edited = model(x)[0]
    assert not torch.allclose(edited, Block().eval()(x)[0], atol=1e-4)
    assert torch.allclose(tt.merge(model, "a")(x)[0], edited, atol=1e-4)
    with tt.rows(model, ["a", None, "a"]):
        assert torch.allclose(model(x)[0][[0, 2]], edited[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(tt.methods()) - ACT_THERE))
@torch.no_grad()
def test_all_others_edit_the_output_of_projections_or_say_why_not(kind: str) -> None:
    model, x = Block().eval(), torch.randn(ROWS, LENGTH, WIDTH)
    method = tt.method(SETTINGS.get(kind, kind))
    places = [Place(path) for path in PROJECTIONS]
    inside = {name: v.aimed(places) for name, v in method if isinstance(v, Method)}
    try:
        attach(model, method.replace(**inside) if inside else method.aimed(places), "a")
        model(x)
    except TrimtabError as error:
        assert str(error)
        return
    assert tt.probe(model, x) == []
    with tt.using(model, None):
        assert torch.equal(model(x)[0], Block().eval()(x)[0])


@torch.no_grad()
def test_torchs_encoder_takes_no_way_around_them_with_padding_either() -> None:
    """In evaluation it takes padding out, and calls none of its layers."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, on what it does with padding
        _padded(nn.Sequential(nn.TransformerEncoder(layer, 2)).eval())


def _padded(model: nn.Sequential) -> None:
    x, seen = torch.randn(ROWS, LENGTH, WIDTH), ~PADDING
    for targets in ("self_attn", "linear1"):
        bare = model[0](x, src_key_padding_mask=PADDING)
        shaken(model, f"lora(rank=2, alpha=4, targets='{targets}')")
        assert tt.probe(model, x) == []
        edited = model[0](x, src_key_padding_mask=PADDING)
        assert not torch.allclose(edited[seen], bare[seen], atol=1e-3)
        trained = model.train()[0](x, src_key_padding_mask=PADDING)
        assert torch.allclose(edited[seen], trained[seen], atol=1e-5)
        tt.detach(model.eval(), "a")
        assert torch.equal(model[0](x, src_key_padding_mask=PADDING), bare)


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(TargetError, match="Target 'attn' itself"):
        attach(Block(), tt.method("lora(targets='out_proj')"), "a")
    with pytest.raises(UnsupportedError, match="parameter of its own"):
        attach(Block(), tt.method("lora(targets='attn', bias='lora_only')"), "a")
    with pytest.raises(TargetError, match="name its projections"):
        attach(
            Block(),
            tt.method({"kind": "lora", "targets": "attn", "rank_pattern": {"attn": 2}}),
            "a",
        )
    model = Block()
    attach(model, tt.method("lora(targets='attn')"), "a")
    with pytest.raises(TargetError, match="only one of the two"):
        attach(model, tt.method({"kind": "ia3", "targets": "attn", "feedforward": ()}), "b")
    with pytest.raises(UnsupportedError, match="is_causal"):
        model(torch.randn(ROWS, LENGTH, WIDTH), is_causal=True)


def test_keys_of_several_widths_are_no_such_attention() -> None:
    with pytest.raises(TargetError):
        attach(Block(kdim=8), tt.method("lora(targets='attn')"), "a")
