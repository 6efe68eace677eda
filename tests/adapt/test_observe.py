"""Looking at the bare model: what is seen is right, and nothing of the base is touched."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from trimtab.adapt.observe import observe
from trimtab.adapt.observed import Gradients, Inputs, Observed
from trimtab.adapt.pca import Components
from trimtab.adapt.plan import layer_at
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import DataError, UnsupportedError


def batch(rows: int = 6, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Three padded positions in the first row, and a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def seen(
    model: nn.Module, paths: list[str], what: Inputs | Gradients, data: Iterable[object]
) -> dict[str, list[Observed]]:
    anatomy = anatomy_of(model)
    wants = {}
    for path in paths:
        stacked = path in anatomy.experts
        layers = anatomy.expert_layers(path) if stacked else [layer_at(anatomy, path)]
        wants[path] = layers, what
    return observe(model, anatomy, wants, data)


def test_gradients_are_those_of_the_weights_and_the_base_is_left_alone() -> None:
    model = tiny.llama()
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    paths = ["model.layers.0.self_attn.v_proj", "lm_head"]
    data = [batch(seed=1), batch(seed=2)]
    found = seen(model, paths, Gradients(), data)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.lm_head.weight.requires_grad_(True)
    weights = [model.get_submodule(path).weight for path in paths]
    sums = [torch.zeros_like(weight) for weight in weights]
    for one in data:
        grads = torch.autograd.grad(model.eval()(**one).loss, weights)
        sums = [total + g / 2 for total, g in zip(sums, grads, strict=True)]
    for path, expected in zip(paths, sums, strict=True):
        torch.testing.assert_close(found[path][0]["gradient"], expected)


def test_an_error_in_a_batch_leaves_no_trace() -> None:
    model = tiny.llama()
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    model.train()
    bad = {**batch(), "attention_mask": torch.ones(2, 2)}
    for method in (tt.LoRA(rank=2, init="lora-ga"), tt.LoRA(rank=2, init="eva")):
        with pytest.raises(IndexError):
            tt.attach(model, method, "a", batches=[batch(), bad])
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(module.training for module in model.modules())


def test_tied_weights_are_seen_apart() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = seen(model, ["model.embed_tokens", "lm_head"], Gradients(), [batch()])
    both = torch.autograd.grad(model(**batch()).loss, model.lm_head.weight)[0]
    looked_up = found["model.embed_tokens"][0]["gradient"].T  # canonical: (width, vocabulary)
    torch.testing.assert_close(looked_up + found["lm_head"][0]["gradient"], both)
    absent = sorted(set(range(97)) - set(batch()["input_ids"].flatten().tolist()))
    assert not bool(looked_up[absent].any())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_that_is_there_already_does_not_act() -> None:
    model = tiny.llama()
    paths = ["model.layers.1.mlp.down_proj"]
    bare = seen(model, paths, Gradients(), [batch()])
    inputs = seen(model, paths, Inputs(4), [batch()])
    first = tt.attach(model, tt.LoRA(rank=2, alpha=64), "first")
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_()
    for what, expected in ((Gradients(), bare), (Inputs(4), inputs)):
        again = seen(model, paths, what, [batch()])
        for key, value in expected[paths[0]][0].items():
            torch.testing.assert_close(again[paths[0]][0][key], value, rtol=1e-4, atol=1e-8)
    assert all(parameter.grad is None for parameter in first.parameters())


def test_inputs_leave_out_padding_and_the_prompt() -> None:
    model = tiny.llama()
    path = "model.layers.2.mlp.down_proj"
    kept: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    found = seen(model, [path], Inputs(48), [batch()])[path][0]
    handle.remove()
    rows = kept[0][batch()["labels"] != -100]
    assert int(found["count"]) == len(rows) == 6 * 8 - 3
    _, s, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    cosines = (found["directions"][:20] * v[:20]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(20), atol=1e-3, rtol=0)
    shares = s.square() / s.square().sum()
    torch.testing.assert_close(found["shares"][:20], shares[:20], atol=1e-5, rtol=1e-3)


def test_the_encoder_and_the_decoder_have_masks_of_their_own() -> None:
    model = tiny.t5()
    given = batch()
    labels = given["labels"][:, :9]  # 5 of 9 count in each row
    data = [{**given, "labels": labels}]
    counts = {"encoder": 6 * 12 - 3, "decoder": 6 * 5}
    paths = {
        "encoder.block.0.layer.0.SelfAttention.q": counts["encoder"],
        "decoder.block.0.layer.0.SelfAttention.q": counts["decoder"],
        "decoder.block.0.layer.1.EncDecAttention.q": counts["decoder"],
        "decoder.block.0.layer.1.EncDecAttention.k": counts["encoder"],
    }
    for length in (9, 12):
        labels = given["labels"].roll(0)[:, :length].clone()
        labels[:, 9:] = -100
        data = [{**given, "labels": labels}]
        found = seen(model, list(paths), Inputs(4), data)
        assert {path: int(found[path][0]["count"]) for path in paths} == paths, length


def test_each_expert_sees_its_own_tokens() -> None:
    model = tiny.mixtral()
    path = "model.layers.0.mlp.experts.gate_up_proj"
    given = batch(rows=12)
    found = seen(model, [path], Inputs(4), [given])[path]
    counted = int((given["labels"] != -100).sum())
    assert sum(int(one["count"]) for one in found) == 2 * counted  # two experts a token
    gradients = seen(model, [path], Gradients(), [given])[path]
    weight = model.get_submodule("model.layers.0.mlp.experts").gate_up_proj
    expected = torch.autograd.grad(model(**given).loss, weight)[0]
    torch.testing.assert_close(torch.stack([one["gradient"] for one in gradients]), expected)


def test_patches_are_what_a_convolution_multiplies() -> None:
    model = tiny.mixed()
    found = seen(model, ["conv1", "conv2"], Inputs(48), [torch.arange(3, 67).view(8, 8)])
    assert found["conv1"][0]["directions"].shape[1] == 16 * 3
    assert found["conv2"][0]["directions"].shape == (6, 6)
    adapter = tt.attach(
        model, tt.LoRA(rank=3, init="eva", targets=("conv1", "conv2")), "a",
        batches=[torch.arange(3, 67).view(8, 8)],
    )  # fmt: skip
    assert adapter.tensors["conv2.lora_A.weight"].shape[1:] == (1, 3, 2)
    with pytest.raises(UnsupportedError, match="grouped"):
        seen(model, ["grouped"], Inputs(2), [torch.arange(3, 67).view(8, 8)])


def test_convolutions_and_embeddings_have_gradients_of_their_shape() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.mixed()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).square().mean()

    model = Scored()
    targets = ["inner.embed", "inner.conv1", "inner.grouped", "inner.conv2"]
    found = seen(model, targets, Gradients(), [torch.arange(3, 67).view(8, 8)])
    shapes = [tuple(found[path][0]["gradient"].shape) for path in targets]
    assert shapes == [(16, 97), (12, 16, 3), (8, 6, 3), (4, 1, 3, 2)]
    method = tt.LoRA(rank=2, init="lora-ga", targets=targets)
    adapter = tt.attach(model, method, "a", batches=[torch.arange(3, 67).view(8, 8)])
    assert adapter.fixed


def test_what_has_no_loss_or_is_never_reached_is_told() -> None:
    model = tiny.llama()
    given = batch()
    path = ["lm_head"]
    with pytest.raises(DataError, match="pass labels"):
        seen(model, path, Gradients(), [{"input_ids": given["input_ids"]}])
    empty = {**given, "labels": torch.full_like(given["labels"], -100)}
    with pytest.raises(DataError, match="no label that counts"):
        seen(model, path, Gradients(), [empty])
    with pytest.raises(DataError, match="give more batches"):
        seen(model, path, Gradients(), [])

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).sum()

    for what in (Gradients(), Inputs(1)):
        with pytest.raises(DataError, match="no batch reaches unused"):
            seen(Unused(), ["used", "unused"], what, [torch.randn(3, 4)])


def test_components_seen_in_parts_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 12, generator=generator) * torch.linspace(3, 0.1, 12) + 5
    parts = Components(12, 0.99)
    for piece in x.split([1, 40, 0, 49]):
        parts.see(piece)
    _, s, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(
        (parts.directions * v).sum(1).abs(), torch.ones(12), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(parts.shares, s.square() / s.square().sum(), atol=1e-5, rtol=1e-4)
    assert parts.count == 90


def test_layers_that_settle_are_seen_no_more() -> None:
    model = tiny.llama()
    calls: list[int] = []

    def endless() -> Iterable[object]:
        while True:
            calls.append(1)
            yield batch()

    found = seen(model, ["model.layers.0.self_attn.q_proj"], Inputs(4), endless())
    assert found and len(calls) == 2
