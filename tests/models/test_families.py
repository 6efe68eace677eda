"""Where each architecture keeps its parts: checked against what the modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.models.others import MODELS, inputs_of
from tests.tiny import CASES, output, pick
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import TargetError, UnsupportedError

OWN_SOFTMAX = ("bloom", "deberta", "falcon", "gpt-neo", "gptj")
"""Models whose attention does not ask the registry of transformers for its function."""
every_model = pytest.mark.parametrize("name", MODELS)


class Watched:
    """What modules are given and give in one forward, by path."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.given: dict[str, Tensor] = {}
        self.gave: dict[str, Tensor] = {}
        modules = anatomy_of(model).modules
        handles = [
            modules[path].register_forward_hook(self._hook(path), with_kwargs=True)
            for path in paths
            if path in modules
        ]
        with torch.no_grad():
            output(model, inputs_of(model))
        for handle in handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            self.given[path] = args[0] if args else next(iter(kwargs.values()))
            self.gave[path] = out[0] if isinstance(out, tuple) else out

        return hook


@every_model
def test_every_block_has_one_of_each_part(name: str) -> None:
    anatomy = anatomy_of(MODELS[name]())
    blocks = len(anatomy.blocks)
    crossing = len(anatomy.role("cross_attention"))
    fused, keys = anatomy.role("fused_qkv"), anatomy.role("keys")
    assert blocks and len(anatomy.role("self_attention")) == blocks
    assert len(fused) + len(keys) == blocks + crossing
    assert len(keys) == len(anatomy.role("values")) == len(anatomy.role("queries"))
    assert len(anatomy.role("attention_output")) == blocks + crossing
    for role in ("mlp_input", "mlp_output", "mlp_down"):
        assert len(anatomy.role(role)) == blocks, role
    assert len(anatomy.role("mlp_norm")) in (0, blocks)
    for role in ("attention_output", "mlp_output", "mlp_input", "self_attention"):
        assert None not in [anatomy.block_of(path) for path in anatomy.role(role)], role
    outside = {p for p in anatomy.linears if anatomy.block_of(p) is None}
    parts = set(anatomy.role("attention")) | set(anatomy.role("mlp"))
    assert parts == set(anatomy.linears) - outside


@every_model
@torch.no_grad()
def test_outputs_of_sub_layers_are_what_is_added_to_the_residual(name: str) -> None:
    """Every sub-layer's output set to zero leaves the stream as it entered; in post-norm families, normed."""
    model = MODELS[name]().double()
    anatomy = anatomy_of(model)
    for path in anatomy.norms:  # so that a norm of a norm is that norm
        norm = anatomy.modules[path]
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            norm.eps = 1e-12
    outputs = [*anatomy.role("attention_output"), *anatomy.role("mlp_output")]
    handles = [anatomy.modules[p].register_forward_hook(_zero) for p in outputs]
    watched = Watched(model, [*anatomy.blocks, *anatomy.role("mlp_norm")])
    for handle in handles:
        handle.remove()
    for block in anatomy.blocks:
        before, after = watched.given[block], watched.gave[block]
        if anatomy.role("mlp_norm"):
            assert torch.allclose(_normed(before), after, atol=1e-9), block
        else:
            assert torch.equal(before, after), block


def _zero(module: nn.Module, args: Any, out: Any) -> Any:
    zeroed = torch.zeros_like(out[0] if isinstance(out, tuple) else out)
    return (zeroed, *out[1:]) if isinstance(out, tuple) else zeroed


def _normed(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-12)


@every_model
def test_the_input_of_the_feed_forward_reaches_its_first_layers(name: str) -> None:
    """The last linear's input is the inner activations; `mlp_input` is given hidden states of the model's width."""
    model = MODELS[name]().double()
    anatomy = anatomy_of(model)
    down = [path for path in anatomy.role("mlp_down") if path in anatomy.modules]
    watched = Watched(model, [*anatomy.role("mlp_input"), *down])
    for path in anatomy.role("mlp_input"):
        assert watched.given[path].shape[-1] == anatomy.width_at(path), path
    for path in down:
        assert watched.given[path].shape[-1] != anatomy.width_at(path), path
        assert watched.gave[path].shape[-1] == anatomy.width_at(path), path


@every_model
def test_the_norm_after_the_feed_forward_is_given_its_sum_with_the_residual(name: str) -> None:
    model = MODELS[name]().double()
    anatomy = anatomy_of(model)
    norms = anatomy.role("mlp_norm")
    watched = Watched(model, [*norms, *anatomy.role("mlp_output"), *anatomy.blocks])
    for norm, out, block in zip(norms, anatomy.role("mlp_output"), anatomy.blocks, strict=False):
        assert not torch.equal(watched.given[norm].flatten(), watched.gave[out].flatten())
        assert torch.equal(watched.gave[norm].flatten(), watched.gave[block].flatten())


# -- towers, scaled embeddings and norms --------------------------------------------------------------


def test_widths_and_heads_of_two_towers() -> None:
    anatomy = anatomy_of(tiny.clip())
    text, vision = (f"{tower}_model.encoder.layers.1.mlp" for tower in ("text", "vision"))
    assert (anatomy.width_at(text), anatomy.width_at(vision)) == (32, 24)
    assert (anatomy.key_heads_at(text), anatomy.key_heads_at(vision)) == ((4, 8), (4, 6))


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta", "clip"])
@torch.no_grad()
def test_positions_that_a_batch_shares_are_looked_up_for_each_row_of_a_mixed_one(name: str) -> None:
    model, inputs = CASES[name].make().double(), CASES[name].inputs()
    for number, who in enumerate(("a", "b")):
        adapter = tt.attach(model, "lora(rank=2, targets='embeddings')", who)
        generator = torch.Generator().manual_seed(number)
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    rows = ["a", None, "b", "a"]
    with tt.rows(model, rows):
        together = output(model, inputs)
    for row, who in enumerate(rows):
        with tt.using(model, who):
            assert (together[row] - output(model, pick(inputs, [row]))[0]).abs().max() < 1e-9


@pytest.mark.parametrize("name", sorted(MODELS.keys() - CASES.keys()))
@torch.no_grad()
def test_methods_share_a_batch_on_families_without_laws_of_their_own(name: str) -> None:
    model = MODELS[name]().double()
    inputs = inputs_of(model)
    # SigLIP's attention does not hand keywords on to the function that it asks for
    without = name in (*OWN_SOFTMAX, "siglip")
    prefix = "lora(rank=2, alpha=1)" if without else "prefix(length=3, init_std=1.0)"
    texts = ["lora(rank=2)", "ia3", "bottleneck(size=3)", prefix]
    for number, text in enumerate(texts):
        adapter = tt.attach(model, text, str(number))
        generator = torch.Generator().manual_seed(number)
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with tt.rows(model, ["0", "1", "2", "3"]):
        together = output(model, inputs)
    for row in range(4):
        with tt.using(model, str(row)):
            alone = output(model, pick(inputs, [row]))[0]
        assert (together[row] - alone).abs().max() < 1e-9, texts[row]
        with tt.using(model, None):
            assert not torch.equal(alone, output(model, pick(inputs, [row]))[0]), texts[row]
    for who, text in (("0", "lora"), ("1", "ia3")):
        with tt.using(model, who):
            expected = output(model, inputs)
        assert (output(tt.merge(model, who), inputs) - expected).abs().max() < 1e-5, text


@pytest.mark.parametrize("name", [*OWN_SOFTMAX, "siglip"])
def test_a_prefix_is_refused_where_nothing_would_arrive(name: str) -> None:
    """SigLIP asks the registry, but drops what is handed to its attention: a prefix there did nothing, silently."""
    with pytest.raises(UnsupportedError, match="does not use the attention registry"):
        tt.attach(MODELS[name](), "prefix", "a")


def test_a_table_that_is_never_called_is_no_site() -> None:
    """DeBERTa's relative positions are read from the weight of an embedding that nobody calls."""
    model = tiny.deberta()
    assert "deberta.encoder.rel_embeddings" not in anatomy_of(model).role("all")
    with pytest.raises(TargetError, match="never called"):
        tt.attach(model, "full(targets='rel_embeddings')", "a")


def test_the_output_of_torchs_own_attention_is_no_site() -> None:
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj``; an edit there would do nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert anatomy_of(model).linears == ["linear1", "linear2"]
    assert "self_attn.out_proj" not in anatomy_of(model).role("all") + anatomy_of(model).biased
    with pytest.raises(TargetError, match="never called"):
        tt.attach(model, "lora(targets='out_proj')", "a")
    tt.attach(model, "lora", "a")
    assert tt.probe(model, torch.ones(1, 3, 16)) == []


@torch.no_grad()
def test_torchs_own_encoder_takes_no_way_around_its_adapters() -> None:
    """In evaluation it would read the weights of its layers and call none of them."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(2, 3, 16)
    adapter = tt.attach(model, "lora(rank=2)", "a")
    base = model(x)
    for parameter in adapter.parameters():
        parameter.add_(torch.randn_like(parameter))
    assert tt.probe(model, x) == []
    edited = model(x)
    assert not torch.allclose(edited, base, atol=1e-3)
    assert torch.allclose(edited, model.train()(x), atol=1e-5)
    assert torch.allclose(tt.merge(model.eval(), "a")(x), edited, atol=1e-4)


def test_a_policy_cannot_read_two_towers() -> None:
    with pytest.raises(UnsupportedError, match="two towers, target one"):
        tt.attach(tiny.clip(), "spottune", "a")


@pytest.mark.parametrize("name", ["bart", "gemma3"])
def test_embeddings_that_scale_their_rows_merge(name: str) -> None:
    model = CASES[name].make()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and "embed_scale" in module.__dict__:
            module.embed_scale = 3.0  # BART's, where scale_embedding is set
    model = model.double()
    inputs = CASES[name].inputs()
    adapter = tt.attach(model, "lora(rank=2, targets='embeddings')", "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    expected = output(model, inputs)
    assert torch.allclose(output(tt.merge(model, "a"), inputs), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_norms_that_multiply_by_one_more_than_their_weight_merge(name: str) -> None:
    model = CASES[name].make().double()
    inputs = CASES[name].inputs()
    for method in ("ia3(targets='norms', feedforward=())", "full(targets='norms')"):
        adapter = tt.attach(model, method, "a")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.5)
        expected = output(model, inputs)
        merged = tt.merge(model, "a")
        tt.detach(model, "a")
        assert not torch.allclose(output(model, inputs), expected, atol=1e-3)
        assert torch.allclose(output(merged, inputs), expected, atol=1e-6), method


def test_bitfit_finds_every_bias_outside_the_head() -> None:
    for name in ("deberta", "gpt2", "falcon", "bloom", "bart", "vit", "clip", "roberta"):
        model = CASES[name].make()
        anatomy = anatomy_of(model)
        head = tuple(f"{path}." for path in anatomy.head)
        biases = [
            parameter.numel()
            for path, parameter in model.named_parameters()
            if path.endswith(".bias") and not path.startswith(head)
        ]
        assert tt.attach(model, "bitfit", "a").count == sum(biases), name
