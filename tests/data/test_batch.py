"""Packed ≡ each document alone; packing loses nothing and overfills nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data import kit
from trimtab.data import Batch, Datum, TokenStats, collate, pack, plan_batches
from trimtab.errors import DataError


def data_of(lengths: list[int], seed: int = 0) -> list[Datum]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, 64, (length + 1,), generator=generator).tolist()
        weights = [float(place % 3 != 0) * (number + 1) for place in range(length + 1)]
        data.append(Datum.causal(ids, weights, origin=f"x:{number + 1}"))
    return data


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [kit.tiny_llama, kit.tiny_gpt2])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("lengths", "row_tokens"),
    [
        ([5, 9, 1, 7, 12, 3], 16),
        ([5, 9, 1, 7], None),
        ([4, 1, 1], 4),
        ([12, 11, 9], 12),  # one document a row: no mask, though rows are padded
        ([1, 1, 1, 1], None),
        ([1, 31, 2], 32),
        ([3], None),
    ],
)
def test_each_document_is_as_if_alone(
    make: Callable, attention: str, packed: bool, lengths: list[int], row_tokens: int | None
) -> None:
    model, data = make(attention), data_of(lengths)
    batch = collate(data, pad_id=0, packed=packed, row_tokens=row_tokens)
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        assert sorted(document.index for document in batch.documents) == list(range(len(data)))
        for document in batch.documents:
            alone = model(input_ids=torch.tensor([data[document.index].tokens])).logits[0]
            together = logits[document.row, document.start : document.stop]
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [kit.tiny_llama, kit.tiny_gpt2])
def test_gradients_of_packed_rows_are_those_of_the_documents(make: Callable) -> None:
    data = data_of([5, 9, 1, 7, 12])

    def gradients(batches: list[Batch]) -> list[torch.Tensor]:
        model = make("sdpa")
        for batch in batches:
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.targets.flatten(), reduction="none"
            )
            (losses * batch.weights.flatten()).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    together = gradients([collate(data, pad_id=0, row_tokens=16)])
    alone = gradients([collate([datum], pad_id=0) for datum in data])
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(20, 64) | st.none(),
    st.booleans(),
    st.booleans(),
)
def test_collate_keeps_every_datum_whole(
    lengths: list[int], row_tokens: int | None, packed: bool, grouped: bool
) -> None:
    data = data_of(lengths)
    groups = [index % 3 for index in range(len(data))] if grouped else None
    batch = collate(data, pad_id=0, packed=packed, row_tokens=row_tokens, groups=groups)
    rows, width = batch.input_ids.shape
    assert sorted(document.index for document in batch.documents) == list(range(len(data)))
    assert row_tokens is None or width <= row_tokens
    covered = torch.zeros(rows, width, dtype=torch.long)
    owner_of_row: dict[int, int] = {}
    for document in batch.documents:
        datum = data[document.index]
        part = (document.row, slice(document.start, document.stop))
        covered[part] += 1
        assert tuple(batch.input_ids[part].tolist()) == datum.tokens
        assert tuple(batch.targets[part].tolist()) == datum.targets
        assert tuple(batch.weights[part].tolist()) == datum.weights
        assert batch.position_ids[part].tolist() == list(range(len(datum)))
        if groups is not None:
            owner = groups[document.index]
            assert owner_of_row.setdefault(document.row, owner) == owner
    owners = list(owner_of_row.values())
    assert sum(a != b for a, b in pairwise(owners)) < max(1, len(set(owners)))
    assert covered.max() == 1
    assert batch.weights[covered == 0].sum() == 0
    assert batch.position_ids.max() < max(lengths)
    assert batch.tokens == sum(lengths)
    assert batch.padding == pytest.approx(1 - sum(lengths) / (rows * width))
    if packed:
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, covered)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_packing(lengths: list[int], row_tokens: int) -> None:
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < fill <= row_tokens for fill in fills)
    # Any-fit: no two rows could have been one.
    assert sum(sorted(fills)[:2]) > row_tokens or len(fills) < 2
    assert rows == pack(lengths, row_tokens)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200), st.booleans())
def test_micro_batches(lengths: list[int], max_tokens: int, packed: bool) -> None:
    batches = plan_batches(lengths, max_tokens, packed=packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert (sum(sizes) if packed else max(sizes) * len(sizes)) <= max_tokens


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(9, 30), st.integers(0, 30))
def test_padded_micro_batches_cost_least(lengths: list[int], max_tokens: int, each: int) -> None:
    def cost(batches: list[list[int]]) -> int:
        return sum(each + max(batch) * len(batch) for batch in batches)

    def ways(rest: list[int]) -> Iterator[list[list[int]]]:
        """All ways to cut a list in pieces that are small enough."""
        if not rest:
            yield []
        for stop in range(1, len(rest) + 1):
            if max(rest[:stop]) * stop <= max_tokens:
                yield from ([rest[:stop], *others] for others in ways(rest[stop:]))

    batches = [
        [lengths[index] for index in batch]
        for batch in plan_batches(lengths, max_tokens, each=each)
    ]
    assert cost(batches) == min(map(cost, ways(sorted(lengths))))
    longest = [max(batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_what_does_not_fit_is_an_error_that_names_it() -> None:
    data = data_of([3, 9])
    for packed in (True, False):
        with pytest.raises(DataError, match=r"^x:2 has 9 tokens, more than a row of 8"):
            collate(data, pad_id=0, packed=packed, row_tokens=8)
    with pytest.raises(DataError, match="no data"):
        collate([], pad_id=0)
    with pytest.raises(DataError, match="1 groups were given for 2 data"):
        collate(data, pad_id=0, groups=["a"])
    with pytest.raises(DataError, match="example 1 has 9 tokens"):
        plan_batches([3, 9], 8)
    with pytest.raises(DataError, match="9 tokens does not fit a row of 8"):
        pack([3, 9], 8)


def test_batch_moves_between_devices() -> None:
    for packed in (True, False):
        batch = collate(data_of([3, 9]), pad_id=0, packed=packed).to("meta")
        assert batch.input_ids.device.type == batch.weights.device.type == "meta"
        assert (batch.attention_mask is None) == packed


def test_statistics() -> None:
    data = data_of([3, 9, 4, 30])
    stats = TokenStats.of(data)
    assert (stats.documents, stats.tokens) == (4, 46)
    assert stats.trained == sum(1 for datum in data for weight in datum.weights if weight)
    assert (stats.shortest, stats.median, stats.longest) == (3, 6.5, 30)
    assert stats.bins[0] == (3, 5, 2)
    assert stats.bins[-1] == (30, 30, 1)
    assert sum(count for *_, count in stats.bins) == 4
    assert "4 documents, 46 tokens" in str(stats)
    with pytest.raises(DataError, match="no examples"):
        TokenStats.of([])
