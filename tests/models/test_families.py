"""Where each architecture keeps its parts: checked against what the modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

import trimtab as tt
from tests import tiny
from tests.tiny import CASES, SMALL_DECODER, VOCABULARY, output, pick
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import TargetError, UnsupportedError
from trimtab.models.fused import Fused


def _decoder(config: type, model: type, **changes: Any) -> nn.Module:
    given = {k: v for k, v in SMALL_DECODER.items() if k != "num_key_value_heads"}
    built: nn.Module = tiny._seeded(lambda: model(config(**{**given, **changes})))
    return built


def gpt_neox() -> nn.Module:
    return _decoder(
        GPTNeoXConfig, GPTNeoXForCausalLM, hidden_dropout=0.0, use_parallel_residual=False
    )


def phi3() -> nn.Module:
    return _decoder(Phi3Config, Phi3ForCausalLM, num_key_value_heads=2)


def opt(first: bool = True) -> nn.Module:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    return _decoder(OPTConfig, OPTForCausalLM, do_layer_norm_before=first, **sizes)


def gpt_neo() -> nn.Module:
    kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
    return _decoder(GPTNeoConfig, GPTNeoForCausalLM, **kinds, window_size=4)


def modernbert() -> nn.Module:
    return _decoder(ModernBertConfig, ModernBertForMaskedLM, cls_token_id=1, sep_token_id=2)


def distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return tiny._seeded(lambda: DistilBertForSequenceClassification(config))


def mbart() -> nn.Module:
    config = MBartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, dropout=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tiny._seeded(lambda: MBartForConditionalGeneration(config))


MODELS = {
    **{name: case.make for name, case in CASES.items() if name not in ("mixed", "classifier")},
    "distilbert": distilbert,
    "gpt-neo": gpt_neo,
    "gpt-neox": gpt_neox,
    "mbart": mbart,
    "modernbert": modernbert,
    "opt": opt,
    "opt-post-norm": lambda: opt(first=False),
    "phi3": phi3,
}
OWN_SOFTMAX = ("bloom", "deberta", "falcon", "gpt-neo")
"""Models whose attention does not ask the registry of transformers for its function."""
every_model = pytest.mark.parametrize("name", MODELS)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    for case in CASES.values():
        if type(case.make()) is type(model):
            return case.inputs()
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=generator)
    both = anatomy_of(model).encoder_decoder
    return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if both else {"input_ids": ids}


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


# -- fused projections --------------------------------------------------------------------------------

FUSED = {
    "falcon-new": (tiny.falcon, (4, 2, 8)),
    "falcon-multi-query": (
        lambda: tiny.falcon(new_decoder_architecture=False, multi_query=True, alibi=True),
        (4, 1, 8),
    ),
    "falcon-multi-head": (
        lambda: tiny.falcon(
            new_decoder_architecture=False,
            multi_query=False,
            parallel_attn=False,
            num_kv_heads=None,
        ),
        (4, 4, 8),
    ),
    "bloom": (tiny.bloom, (4, 4, 8)),
    "gpt-neox": (gpt_neox, (4, 4, 8)),
    "gpt2": (tiny.gpt2, (4, 4, 8)),
    "phi3": (phi3, (4, 2, 8)),
    "modernbert": (modernbert, (4, 4, 8)),
}


def split_by_hand(name: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As each model's own source splits its projection: views (…, heads, width)."""
    lead = qkv.shape[:-1]
    if name in ("gpt2", "modernbert"):
        q, k, v = qkv.split(32, -1)
        return q, k, v
    if name == "phi3":
        return qkv[..., :32], qkv[..., 32:48], qkv[..., 48:]
    if name == "gpt-neox":
        return qkv.view(*lead, 4, 24).chunk(3, -1)
    if name == "falcon-new":
        grouped = qkv.view(*lead, 2, 4, 8)
        return grouped[..., :-2, :], grouped[..., -2:-1, :], grouped[..., -1:, :]
    if name == "falcon-multi-query":
        heads = qkv.view(*lead, 6, 8)
        return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    heads = qkv.view(*lead, 4, 3, 8)
    return heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_a_fused_projection(name: str) -> None:
    make, (heads, keys, width) = FUSED[name]
    anatomy = anatomy_of(make())
    for path in anatomy.role("fused_qkv"):
        rows = anatomy.fused_rows(path)
        assert [len(r) for r in rows] == [heads * width, keys * width, keys * width]
        numbered = torch.arange(anatomy.fused(path).outputs)
        by_hand = split_by_hand(name, numbered)
        for mine, theirs in zip(rows, by_hand, strict=True):
            assert torch.equal(mine, theirs.flatten())
        assert Fused.parse(str(anatomy.fused(path))) == anatomy.fused(path)


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_ia3_rescales_keys_and_values_of_a_fused_projection(name: str) -> None:
    """Against a hook that splits the projection as the model does, and rescales keys and values by hand."""
    make, _ = FUSED[name]
    model = make().double()
    paths = anatomy_of(model).role("fused_qkv")
    adapter = tt.attach(model, "ia3(feedforward=())", "a")
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter.tensors.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    inputs = inputs_of(model)
    mine = output(model, inputs)
    scales = {path: adapter.tensors[f"{path}.ia3_l"].double().flatten() for path in paths}
    tt.detach(model, "a")
    for path in paths:
        anatomy_of(model).modules[path].register_forward_hook(_rescale(name, scales[path]))
    theirs = output(model, inputs)
    assert (mine - theirs).abs().max() < 1e-9
    assert sum(scale.numel() for scale in scales.values()) == adapter.count


def _rescale(name: str, scale: Tensor) -> Any:
    """l holds, group by group, the scales of that group's keys and then of its values."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        _, k, v = split_by_hand(name, out)
        groups = k.shape[-2] if k.dim() == out.dim() + 1 else 1
        if name in ("falcon-new", "falcon-multi-query"):
            groups = k.shape[out.dim() - 1] if name == "falcon-new" else 1
        per = scale.view(groups, 2, -1)
        k *= per[:, 0].reshape(k.shape[out.dim() - 1 :])
        v *= per[:, 1].reshape(v.shape[out.dim() - 1 :])
        return out

    return hook


def test_a_fused_projection_of_another_size_is_refused() -> None:
    model = tiny.gpt2()
    model.config.n_head = 3
    with pytest.raises(TargetError, match="96 outputs, and 90 are needed"):
        tt.attach(model, "ia3", "a")


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
    inputs = {key: value.repeat(2, 1) for key, value in inputs_of(model).items()}
    prefix = "lora(rank=2, alpha=1)" if name in OWN_SOFTMAX else "prefix(length=3, init_std=1.0)"
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


@pytest.mark.parametrize("name", OWN_SOFTMAX)
def test_a_prefix_is_refused_where_attention_asks_no_registry(name: str) -> None:
    with pytest.raises(UnsupportedError, match="does not use the attention registry"):
        tt.attach(MODELS[name](), "prefix", "a")


def test_a_table_that_is_never_called_is_no_site() -> None:
    """DeBERTa's relative positions are read from the weight of an embedding that nobody calls."""
    model = tiny.deberta()
    assert "deberta.encoder.rel_embeddings" not in anatomy_of(model).role("all")
    with pytest.raises(TargetError, match="never called"):
        tt.attach(model, "full(targets='rel_embeddings')", "a")


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
    adapter = tt.attach(model, "ia3(targets='norms', feedforward=())", "a")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    expected = output(model, inputs)
    merged = tt.merge(model, "a")
    assert torch.allclose(output(merged, inputs), expected, atol=1e-6)


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


def test_registered_models_are_those_of_transformers() -> None:
    assert all(isinstance(MODELS[name](), PreTrainedModel) for name in MODELS)
