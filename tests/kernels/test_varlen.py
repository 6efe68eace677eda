"""Attention within documents by torch's variable-length kernel: what it is asked for, and on a GPU what it gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tests.engine import kit
from trimtab.adapt import attend
from trimtab.adapt.attach import attach
from trimtab.adapt.documents import Documents
from trimtab.engine import Engine, separating
from trimtab.engine.separating import separates
from trimtab.kernels import varlen
from trimtab.kernels.attention import blocked_attention
from trimtab.methods.lora import LoRA
from trimtab.optim.params import Memory

ENDS = (1, 40, 70, 100, 140)
DOCUMENTS = Documents(ENDS)


def drawn(heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k and v of two rows as models give them: heads were split off the last dimension."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 70, count, width, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, groups, groups)
    ]


def plain_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch says that its kernel computes, for causal attention, a document at a time."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and window_size == (-1, 0)
    assert query.dim() == 3 and enable_gqa == (query.shape[1] != key.shape[1])
    starts = cu_seq_q.tolist()
    assert starts[0] == 0 and starts[-1] == len(query) == len(key) == len(value)
    assert max_q == max_k == max(b - a for a, b in pairwise(starts))
    parts = []
    for start, stop in pairwise(starts):
        q, k, v = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
        made = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(made[0].transpose(0, 1))
    return torch.cat(parts)


def ours(given: list[Tensor]) -> Tensor:
    starts = DOCUMENTS.starts(given[0].device)
    return varlen.documents_attention(*given, 0.3, starts, DOCUMENTS.longest)  # type: ignore[misc]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_it_is_asked_for_what_the_twin_gives(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_kernel", lambda: plain_kernel)
    given = drawn(4, groups, 16, torch.float64, "cpu")
    found, expected = ours(given), blocked_attention(*given, 0.3, ENDS)  # type: ignore[misc]
    torch.testing.assert_close(found, expected)
    outer = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad(found, given, outer),
        torch.autograd.grad(expected, given, outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.skipif(varlen._kernel() is None, reason="this torch has it without grouped queries")
def test_torchs_own_takes_that_call() -> None:
    """On no device: shapes, options and a backward."""
    assert varlen._kernel() is varlen_attn
    given = [tensor.detach().requires_grad_() for tensor in drawn(4, 2, 16, torch.bfloat16, "meta")]
    out = ours(given)
    assert out.shape == (2, 70, 4, 16)
    grads = torch.autograd.grad(out, given, torch.empty_like(out))
    assert [g.shape for g in grads] == [t.shape for t in given]


def test_a_cpu_has_none() -> None:
    assert not varlen.takes(*drawn(4, 2, 16, torch.bfloat16, "cpu"))


def test_what_is_made_of_documents_is_made_once() -> None:
    documents, device = Documents(ENDS), torch.device("cpu")
    assert documents.starts(device) is documents.starts(device)
    assert documents.starts(device).tolist() == [0, *ENDS] and not documents.masked
    assert documents.mask(2, 70, device, True) is documents.mask(2, 70, device, True)
    assert documents.masked
    assert documents == Documents(ENDS) and hash(documents) == hash(Documents(ENDS))


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_the_engine_gives_it_its_documents(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(*given: Any, **options: Any) -> Tensor:
        calls.append(given[3])
        return plain_kernel(*given, **options)

    found = []
    for there in (False, True):
        monkeypatch.setattr(varlen, "takes", lambda *given, there=there: there)
        monkeypatch.setattr(varlen, "_kernel", lambda: kernel)
        base = kit.base()
        adapter = attach(base.model, LoRA(rank=2), "a")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        base.model.double()
        engine = Engine(base, packed=True, memory=Memory(recompute=recompute))
        assert engine._layout.apart
        calls.clear()
        engine.forward_backward(kit.datums(), "a")
        found.append(kit.gradients(list(adapter.parameters())))
    layers = len(base.model.model.layers)
    assert len({id(starts) for starts in calls}) <= len(calls) / layers, "made once for all layers"
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def fails(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize(("kernel", "told"), [(plain_kernel, True), (None, False), (fails, False)])
def test_a_model_is_told_of_documents_where_the_kernel_is_there_and_works(
    kernel: Any, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where nothing of ours takes its place."""
    monkeypatch.setattr(separating, "_masks", lambda device: True)
    monkeypatch.setattr(attend, "_fits", lambda *args, **kwargs: False)
    monkeypatch.setattr(varlen, "takes", lambda *given: kernel is not None)
    monkeypatch.setattr(varlen, "_kernel", lambda: kernel)
    model = kit.llama()
    assert separates(model, 60) and separates(model, 60, told=True) == told


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 1, 40)])
def test_on_a_gpu_it_gives_what_the_twin_gives(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given = drawn(*heads, dtype, "cuda")
    if not varlen.takes(*given):
        pytest.skip("no flash attention here")
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = ours(given), blocked_attention(*exact, 0.3, ENDS)  # type: ignore[misc]
    outer = torch.randn_like(expected)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, given, outer.to(dtype)),
            torch.autograd.grad(expected, exact, outer),
            strict=True,
        ),
    ]
    for mine, right in pairs:
        assert (mine.double() - right).norm() < 2 * torch.finfo(dtype).eps * right.norm()


@pytest.mark.gpu
def test_on_a_gpu_packed_documents_are_kept_apart_by_it() -> None:
    base = kit.base()
    model = base.model.to("cuda", torch.bfloat16)
    layer = model.model.layers[0].self_attn
    takes = varlen.takes(*drawn(4, 2, layer.head_dim, torch.bfloat16, "cuda"))
    assert separates(model, 60) and separates(model, 60, told=True) == takes
    assert not separates(model.float(), 60, told=True)
