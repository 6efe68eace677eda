"""Which rows of a fused projection are queries, keys and values; (IA)³ rescales the last two."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from tests import tiny
from tests.models.others import gpt_bigcode, gpt_neox, inputs_of, modernbert, phi3
from tests.tiny import output
from trimtab.adapt.tree import anatomy_of
from trimtab.errors import TargetError
from trimtab.models.fused import Fused

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
    "gpt-bigcode-multi-query": (gpt_bigcode, (4, 1, 8)),
    "gpt-bigcode-multi-head": (partial(gpt_bigcode, multi_query=False), (4, 4, 8)),
}


def split_by_hand(name: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As each model's own source splits its projection: views (…, heads, width)."""
    lead = qkv.shape[:-1]
    if name in ("gpt2", "modernbert"):
        q, k, v = qkv.split(32, -1)
        return q, k, v
    if name == "phi3":
        return qkv[..., :32], qkv[..., 32:48], qkv[..., 48:]
    if name == "gpt-bigcode-multi-query":
        return qkv[..., :32], qkv[..., 32:40], qkv[..., 40:]
    if name in ("gpt-neox", "gpt-bigcode-multi-head"):
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


def test_a_fused_projection_of_an_unknown_architecture_is_refused() -> None:
    model = tiny.gpt2()
    model.config.model_type = "another"
    with pytest.raises(TargetError, match="is not known for GPT2LMHeadModel"):
        tt.attach(model, "ia3(feedforward=())", "a")


def test_a_fused_projection_of_a_plain_module_is_read_in_thirds() -> None:
    """As timm and torch stack queries, keys and values."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(6, 18)})})
    assert str(anatomy_of(model).fused("attn.qkv")) == "1x6+6"
