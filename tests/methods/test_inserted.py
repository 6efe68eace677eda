"""Bottlenecks and their kin against equations written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartModel, MBartConfig, MBartModel

import trimtab as tt
from tests import tiny
from tests.laws.cells import shaken
from tests.tiny import CASES, output
from trimtab.adapt.bank import bank_of
from trimtab.adapt.parse import method_from
from trimtab.errors import ConfigError, RouteError, UnsupportedError
from trimtab.methods.compacter import glorot, kronecker

FEED_FORWARD, ATTENTION = "bert.encoder.layer.1.output", "bert.encoder.layer.1.attention.output"


def mlp(adapter: tt.Adapter, path: str, h: Tensor, act: Any) -> Tensor:
    """f(h) with the adapter's tensors at a site."""
    p = {slot: t.double() for slot, t in adapter.at_site(path).items()}
    inner = act(h @ p["adapter_down.weight"].T + p["adapter_down.bias"])
    return inner @ p["adapter_up.weight"].T + p["adapter_up.bias"]


def bert_layer(model: nn.Module, x: Tensor, adapter: tt.Adapter, method: str) -> Tensor:
    """One post-norm layer of BERT, by its equations, with adapters where their papers put them."""
    layer = model.get_submodule("bert.encoder.layer.1")
    attended = layer.attention.output.dense(layer.attention.self(x)[0])
    if method == "bottleneck":
        attended = attended + mlp(adapter, f"{ATTENTION}.dropout", attended, F.gelu)
    h = layer.attention.output.LayerNorm(attended + x)
    fed = layer.output.dense(F.gelu(layer.intermediate.dense(h)))
    norm = layer.output.LayerNorm
    if method == "bottleneck":
        return norm(fed + mlp(adapter, f"{FEED_FORWARD}.dropout", fed, F.gelu) + h)
    if method == "pfeiffer":
        return norm(mlp(adapter, f"{FEED_FORWARD}.LayerNorm", norm(fed + h), torch.relu) + fed + h)
    if method == "adapterplus":
        out = norm(fed + h)
        scale = adapter.at_site("bert.encoder.layer.1")["adapter_scale"].double()
        return out + scale * mlp(adapter, "bert.encoder.layer.1", out, F.gelu)
    first = {
        s: t.double() for s, t in adapter.at_site("bert.encoder.layer.1.intermediate.dense").items()
    }
    last = {s: t.double() for s, t in adapter.at_site(f"{FEED_FORWARD}.dropout").items()}
    inner = torch.relu(h @ first["adapter_down.weight"].T + first["adapter_down.bias"])
    return norm(fed + 4 * (inner @ last["adapter_up.weight"].T + last["adapter_up.bias"]) + h)


@pytest.mark.parametrize("method", ["bottleneck", "pfeiffer", "adapterplus", "parallel"])
@torch.no_grad()
def test_a_layer_of_bert_is_the_papers_equations(method: str) -> None:
    model = CASES["bert"].model()
    model.bert.encoder.layer[1].attention.self.config._attn_implementation = "eager"
    seen: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(
            lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y)
        )
    adapter = shaken(tt.attach(model, f"{method}(size=4)", "a"))
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if method == "parallel":
        with pytest.raises(RouteError, match="outside a forward"):
            model.bert.encoder.layer[1](x)
    out = tt.captured(model, model.bert.encoder.layer[1])(x)
    found = out[0] if isinstance(out, tuple) else out
    with tt.using(model, None):
        expected = bert_layer(model, x, adapter, method)
    assert (found - expected).abs().max() < 1e-9
    if method == "adapterplus":  # it edits the block's output, before the hooks of others see it
        assert torch.equal(found, seen[-1])


@pytest.mark.parametrize("name", [n for n in CASES if n != "mixed"])
@torch.no_grad()
def test_first_values(name: str) -> None:
    """Parallel adapters start as the identity, bitwise; the others near it."""
    case = CASES[name]
    model, inputs = case.model(torch.float32), case.inputs()
    base = output(model, inputs)
    for method in ("parallel(size=4)", "parallel(size=4, scaling='learned')"):
        tt.attach(model, method, "a")
        assert torch.equal(output(model, inputs), base)
        tt.detach(model, "a")
    for method in ("bottleneck(size=4)", "compacter(size=8)"):
        tt.attach(model, method, "a")
        change = (output(model, inputs) - base).abs().max()
        assert 0 < change < 1e-2
        tt.detach(model, "a")


def test_a_split_feed_forward_leaves_nothing_behind() -> None:
    model, inputs = CASES["bert"].model(), CASES["bert"].inputs()
    shaken(tt.attach(model, "parallel(size=4)", "a"))
    shaken(tt.attach(model, "parallel(size=4)", "b"), seed=2)
    with tt.rows(model, ["a", ["a", "b"], None, ["b", "a"]]):
        output(model, inputs)
    last = bank_of(model)._last
    assert last is not None and not last.scratch


def test_rows_with_stacks_share_a_split_feed_forward() -> None:
    """The same adapter acts alone in one row and in a stack in another: each finds its own states."""
    case = CASES["bert"]
    model, inputs = case.model(), case.inputs()
    shaken(tt.attach(model, "parallel(size=4)", "a"))
    shaken(tt.attach(model, "parallel(size=4)", "b"), seed=2)
    owners = ["a", ["a", "b"], ["b", "a"], "b"]
    with tt.rows(model, owners):
        together = output(model, inputs)
    for row, owner in enumerate(owners):
        with tt.using(model, owner):
            alone = output(model, {"input_ids": inputs["input_ids"][[row]]})
        assert (together[row] - alone[0]).abs().max() < 1e-9


SIZES = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 31,
         "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2}  # fmt: skip


def test_pfeiffer_reads_through_the_norm_where_the_norm_comes_last() -> None:
    post = tt.attach(BartModel(BartConfig(**SIZES)), "pfeiffer(size=4)", "a")
    assert {site.path.rpartition(".")[2] for site in post.sites} == {"final_layer_norm"}
    pre = tt.attach(MBartModel(MBartConfig(**SIZES)), "pfeiffer(size=4)", "a")
    assert {site.path for site in pre.sites} == {"encoder.layers.0", "decoder.layers.0"}


@pytest.mark.parametrize(
    "method",
    [
        "bottleneck(size=4",
        "parallel(size=4",
        "adapterplus(size=4",
        "compacter(size=8",
        "pfeiffer(size=4",
    ],
)
def test_each_expert_has_its_own(method: str) -> None:
    """Beside or after the experts' own matrices, stacked: rows of a mixed batch are the rows alone."""
    case = CASES["mixtral"]
    model, inputs = case.model(), case.inputs()
    for seed, name in enumerate("ab"):
        adapter = shaken(
            tt.attach(model, f"{method}, targets='experts.down_proj')", name), seed=seed
        )
        assert all(tensor.shape[0] == 4 for tensor in adapter.tensors.values())
    names = ["a", None, "b", "a"]
    with tt.rows(model, names):
        together = output(model, inputs)
    for row, name in enumerate(names):
        with tt.using(model, name):
            alone = output(model, {"input_ids": inputs["input_ids"][[row]]})
        assert (together[row] - alone[0]).abs().max() < 1e-9
    with tt.using(model, None):
        assert (output(model, inputs)[0] - together[0]).abs().max() > 1e-6


def test_a_parallel_adapter_wants_channels_last() -> None:
    model = tiny.mixed()
    for target in ("conv1", "batch_norm", "embed"):
        with pytest.raises(UnsupportedError, match="position by position"):
            tt.attach(model, tt.Parallel(size=4, targets=target), "a")


# -- sizes and presets ----------------------------------------------------------------------------------


def test_size_and_reduction_are_one_or_the_other() -> None:
    assert method_from("pfeiffer(size=8)").reduction is None
    assert method_from("bottleneck(reduction=8)").size is None
    assert method_from("pfeiffer").replace(size=8).reduction is None
    assert method_from(method_from("pfeiffer(size=8)").to_dict()) == tt.Pfeiffer(size=8)
    with pytest.raises(ConfigError, match="either size or reduction"):
        tt.Pfeiffer(size=8, reduction=4)
    with pytest.raises(ConfigError, match="either size or reduction"):
        tt.Pfeiffer(size=None, reduction=None)
    assert tt.attach(tiny.bert(), tt.Pfeiffer(), "a").at_site(
        "bert.encoder.layer.0.output.LayerNorm"
    )["adapter_down.bias"].shape == (2,)


def test_presets_are_the_papers() -> None:
    """Houlsby's and Compacter's papers train the norms; Compacter++ is after the feed-forward only."""
    model = tiny.bert()
    houlsby = tt.attach(model, "houlsby(size=8)", "houlsby")
    assert {s.path.rpartition(".")[2] for s in houlsby.sites if s.method} == {"LayerNorm"}
    assert houlsby.method.size == 8
    small = tt.attach(model, "compacter++(size=8)", "small")
    assert {s.path for s in small.sites if not s.method} == {
        f"bert.encoder.layer.{n}.output.dropout" for n in (0, 1)
    }
    scaled = tt.attach(model, "scaled_parallel(size=4)", "scaled")
    assert any(key.endswith("adapter_scale") for key in scaled.tensors)


# -- stochastic depth, Kronecker products ----------------------------------------------------------------


def test_stochastic_depth_drops_whole_examples_in_training_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    x = torch.randn(400, 3, 6)
    base = model(x)
    shaken(tt.attach(model, "adapterplus(size=4, drop=0.25, targets='0')", "a"))
    full = model.eval()(x) - base
    change = model.train()(x) - base
    ratio = (change * full).sum((1, 2)) / (full * full).sum((1, 2))
    kept = ratio.round(decimals=4) != 0
    assert 0.65 < kept.float().mean() < 0.85
    assert torch.allclose(change[kept], full[kept] / 0.75, atol=1e-5)
    assert not change[~kept].any()


@pytest.mark.parametrize("rank", [1, 3])
def test_the_product_of_factors_is_the_sum_of_kronecker_products(rank: int) -> None:
    """Also for ranks above 1, where the reference implementation's elementwise product is wrong."""
    torch.manual_seed(0)
    n, width, size = 4, 24, 8
    a, s, t = (
        torch.randn(n, n, n),
        torch.randn(n, width // n, rank),
        torch.randn(n, rank, size // n),
    )
    whole = torch.stack([torch.kron(a[i], s[i] @ t[i]) for i in range(n)]).sum(0)
    x = torch.randn(2, 5, width)
    assert torch.allclose(kronecker(x, a, s, t), x @ whole, atol=1e-4)


def test_compacter_starts_as_its_paper_does() -> None:
    """Uniform with gain √2; ``adapters`` tests the truth of the option's text, and always draws normally, gain 1."""
    values = glorot((4, 192, 1), torch.Generator().manual_seed(0))
    bound = 2**0.5 * (6 / (192 + 1)) ** 0.5
    assert 0.99 * bound < values.abs().max() <= bound
    model = tiny.t5()
    adapter = tt.attach(model, "compacter(size=8)", "a")
    rules = [tensor for name, tensor in adapter.named().items() if not name.path]
    assert [tuple(rule.shape) for rule in rules] == [(4, 4, 4)]
    assert 2e-5 < rules[0].std() < 5e-4
    with pytest.raises(UnsupportedError, match="must divide"):
        tt.attach(model, "compacter(size=6)", "b")
