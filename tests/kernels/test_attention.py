"""Attention by blocks against torch's own: outputs and gradients, documents, grouped queries, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels import attention
from trimtab.kernels.attention import blocked_attention

SHAPES = {
    "one block": (2, 4, 4, 9, 8, 8),
    "several blocks": (2, 4, 2, 150, 8, 8),
    "all queries share a key head": (1, 6, 1, 70, 16, 16),
    "values of another width": (3, 4, 2, 65, 8, 12),
    "one token": (2, 2, 2, 1, 4, 4),
}


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v as models give them: heads were split off the last dimension."""
    rows, heads, groups, tokens, width, out = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, width), (groups, width), (groups, out)
    return [
        torch.randn(rows, tokens, *size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for size in sizes
    ]


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    ends: list[int] | None,
    causal: bool = True,
) -> Tensor:
    """The same by torch, under a dense mask."""
    rows, _, tokens, _ = q.shape
    document = torch.zeros(rows * tokens, dtype=torch.long)
    for end in ends or [tokens * (row + 1) for row in range(rows)]:
        document[end:] += 1
    document = document.view(rows, tokens)
    mask = document[:, :, None] == document[:, None]
    if causal:
        mask &= torch.ones(tokens, tokens).tril().bool()
    return F.scaled_dot_product_attention(
        q, k, v, mask[:, None], scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all see all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_plain_attention(
    shape: tuple[int, ...], causal: bool
) -> None:
    inputs = drawn(shape)
    expected = plain(*inputs, 0.3, None, causal)
    outer = torch.randn(expected.shape, dtype=torch.float64)
    found = blocked_attention(*inputs, 0.3, causal=causal)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found, inputs, outer),
        torch.autograd.grad(expected, inputs, outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all see all"])
@pytest.mark.parametrize("scores", [1, 2**9, 2**13, 2**30])
def test_documents_of_a_row_do_not_see_each_other(
    scores: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    inputs = drawn((3, 4, 2, 100, 8, 8))
    ends = [1, 70, 100, 200, 237, 290, 300]
    expected = plain(*inputs, 0.3, ends, causal)
    outer = torch.randn(expected.shape, dtype=torch.float64)
    found = blocked_attention(*inputs, 0.3, ends, causal=causal)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found, inputs, outer),
        torch.autograd.grad(expected, inputs, outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all see all"])
@pytest.mark.parametrize("scores", [1, 2**13, 2**30])
def test_padding_is_not_seen(scores: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    inputs = drawn((3, 4, 2, 100, 8, 8))
    lengths, ends = [100, 3, 97], [100, 103, 200, 297, 300]
    expected = plain(*inputs, 0.3, ends, causal)
    found = blocked_attention(*inputs, 0.3, lengths=lengths, causal=causal)
    outer = torch.randn(expected.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], expected[row, :length])
        outer[row, length:] = 0
    for mine, other in zip(
        torch.autograd.grad(found, inputs, outer),
        torch.autograd.grad(expected, inputs, outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_dropout_leaves_out_shares_and_scales_up_the_others() -> None:
    """Values that are the identity show the shares; the masks that they show give the gradients by plain code."""
    rows, heads, tokens = 2, 4, 40
    q, k, _ = drawn((rows, heads, heads, tokens, 8, 8))
    v = torch.eye(tokens, dtype=torch.float64).expand(rows, heads, -1, -1).clone()
    v.requires_grad_()
    torch.manual_seed(0)
    found = blocked_attention(q, k, v, 0.3, causal=False, dropout=0.25)
    shares = torch.softmax(0.3 * q @ k.mT, -1)
    mask = (found.transpose(1, 2) != 0).double() / 0.75
    assert 0.7 < float(mask.mean()) * 0.75 < 0.8
    expected = (shares * mask @ v).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    outer = torch.randn(expected.shape, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad(found, [q, k, v], outer),
        torch.autograd.grad(expected, [q, k, v], outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    torch.manual_seed(0)
    again = blocked_attention(q, k, v, 0.3, causal=False, dropout=0.25)
    assert torch.equal(again, found)
    other = blocked_attention(q, k, v, 0.3, causal=False, dropout=0.25)
    assert not torch.equal(other, found)


def test_in_bf16_it_is_as_near_as_torchs_own() -> None:
    mine, other = errors(drawn((2, 6, 2, 300, 64, 64), torch.bfloat16))
    assert all(mine < 1.6 * other for mine, other in zip(mine, other, strict=True))


def test_large_scores_and_values_far_from_zero_keep_their_precision() -> None:
    """Scores of some thirty and values around four, in bf16: gradients are nearer to fp64's than torch's own are."""
    generator = torch.Generator().manual_seed(0)
    scale, shift = (6.0, 1.0, 1.0), (0.0, 0.0, 4.0)
    inputs = [
        (torch.randn(1, 200, 4, 64, generator=generator) * s + c).bfloat16().transpose(1, 2)
        for s, c in zip(scale, shift, strict=True)
    ]
    mine, other = errors([tensor.requires_grad_() for tensor in inputs])
    assert all(mine < 1.5 * other for mine, other in zip(mine, other, strict=True))
    assert all(mine < 0.3 * other for mine, other in zip(mine[1:3], other[1:3], strict=True))


def errors(inputs: list[Tensor]) -> tuple[list[float], list[float]]:
    """How far the output and the gradients are from those in fp64: of ours, and of torch's kernel."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    rows, heads, tokens, _ = inputs[0].shape
    generator = torch.Generator().manual_seed(1)
    outer = torch.randn(rows, tokens, heads, inputs[2].shape[-1], generator=generator)
    runs = {}
    for name, given in {"exact": exact, "torch": inputs, "ours": inputs}.items():
        if name == "ours":
            out = blocked_attention(*given, 0.125)
        else:
            out = F.scaled_dot_product_attention(
                *given, is_causal=True, scale=0.125, enable_gqa=True
            ).transpose(1, 2)
        grads = torch.autograd.grad(out, given, outer.to(out.dtype))
        runs[name] = [tensor.detach().double() for tensor in (out, *grads)]
    ours, torchs = (
        [
            float((mine - right).norm() / right.norm())
            for mine, right in zip(runs[name], runs["exact"], strict=True)
        ]
        for name in ("ours", "torch")
    )
    return ours, torchs


def test_little_more_than_what_was_given_is_kept_for_backward() -> None:
    inputs = drawn((1, 4, 2, 50, 8, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda t: t
    ):
        out = blocked_attention(*inputs, 0.3)
    given = {t.untyped_storage().data_ptr() for t in (*inputs, out)}
    more = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert [t.numel() for t in more] == [4 * 50]


@pytest.mark.parametrize("ends", [None, [150, 190, 300], [70, 150, 230, 231, 300]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all see all"])
def test_keys_that_lead_are_seen_by_all(
    ends: list[int] | None, causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = drawn((2, 4, 2, 150, 8, 12), dtype)
    lead_k, lead_v = (torch.randn(2, 2, 5, width).to(dtype).requires_grad_() for width in (8, 12))
    inputs = q, k, v, lead_k, lead_v
    keys, values = torch.cat([lead_k, k], 2), torch.cat([lead_v, v], 2)
    document = torch.zeros(300, dtype=torch.long)
    for end in ends or [150]:
        document[end:] += 1
    document = document.view(2, 150)
    mask = document[:, :, None] == document[:, None]
    mask = mask & torch.ones(150, 150).tril().bool() if causal else mask
    mask = F.pad(mask, (5, 0), value=True)
    wide = [t.double() for t in (q, keys, values)]
    expected = F.scaled_dot_product_attention(*wide, mask[:, None], scale=0.3, enable_gqa=True)
    outer = torch.randn(2, 150, 4, 12, dtype=torch.float64).to(dtype)
    found = blocked_attention(q, keys, values, 0.3, ends, lead=5, causal=causal)
    close = 1e-12 if dtype == torch.float64 else 2e-2
    pairs = [(found, expected.transpose(1, 2))]
    pairs += zip(
        torch.autograd.grad(found, inputs, outer),
        torch.autograd.grad(expected.transpose(1, 2), inputs, outer.double()),
        strict=True,
    )
    for mine, other in pairs:
        assert (mine.double() - other.double()).norm() <= close * other.double().norm()


def test_keys_that_lead_beside_rows_of_several_lengths() -> None:
    q, k, v = drawn((3, 4, 2, 20, 8, 8))
    lead = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    keys, values = torch.cat([lead, k], 2), torch.cat([lead * 2, v], 2)
    lengths = [20, 7, 13]
    found = blocked_attention(q, keys, values, 0.3, lengths=lengths, lead=4, causal=False)
    seen = torch.arange(20) < torch.tensor(lengths)[:, None]
    mask = F.pad(seen, (4, 0), value=True)[:, None, None]
    expected = F.scaled_dot_product_attention(q, keys, values, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
