"""Packed rows: each document with its own adapter is what it is alone, whether a mask or attention itself keeps it
apart, and gates see only its prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import trimtab as tt
from tests.laws.cells import Cell, attached, law
from tests.tiny import CASES
from trimtab.adapt import attention
from trimtab.adapt.bank import Plan, bank_of
from trimtab.adapt.documents import DOCUMENTS, Documents, apart
from trimtab.adapt.route import Route, Span

LENGTHS = (5, 3, 6, 4)
SPANS = (Span(0, 0, 5), Span(0, 5, 8), Span(1, 0, 6), Span(1, 6, 10))
WIDTH = 10


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, positions) of two rows; the first ends in padding that is nobody's."""
    ids, positions = (
        torch.zeros(2, WIDTH, dtype=torch.long),
        torch.zeros(2, WIDTH, dtype=torch.long),
    )
    for document, span in zip(documents, SPANS, strict=True):
        ids[span.row, span.start : span.stop] = document
        positions[span.row, span.start : span.stop] = torch.arange(len(document))
    positions[0, 8:] = torch.arange(2)
    return ids, positions


@law
def test_a_packed_document_is_the_document_alone(cell: Cell) -> None:
    model = CASES[cell.model].model()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 97, (length,), generator=generator) for length in LENGTHS]
    ids, positions = packed(documents)
    attached(cell, model, "a")
    attached(cell, model, "b", seed=2)
    names = ["a", None, "b", "a"]
    prompt = torch.zeros(2, WIDTH, dtype=torch.bool)
    for span in SPANS:
        prompt[span.row, span.start : span.start + 2] = True
    bank = bank_of(model)
    owners = tuple(bank.owner(name) for name in names)
    routes = Route(owners, SPANS), Route((("a",),) * 4, SPANS)
    for route, told in itertools.product(routes, (None, Documents((5, 8, 10, 16, 20)))):
        more = {} if told is None else {DOCUMENTS: told}
        with bank.scope(route, Plan(prompt=prompt)), attention.Ours(model), apart(told):
            together = model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits
        for document, span, owner in zip(documents, SPANS, route.owners, strict=True):
            alone_prompt = torch.zeros(1, len(document), dtype=torch.bool)
            alone_prompt[:, :2] = True
            with bank.scope(Route.everyone(owner), Plan(prompt=alone_prompt)):
                alone = model(input_ids=document[None], use_cache=False).logits[0]
            mine = together[span.row, span.start : span.stop]
            assert (mine - alone).abs().max() < 1e-9, owner


def test_a_pooled_module_cannot_be_packed() -> None:
    from trimtab.errors import RouteError

    model = CASES["bert"].model()
    tt.attach(model, "lora(rank=2, targets='classifier')", "a")
    bank = bank_of(model)
    with (
        bank.scope(Route((("a",), ()), (Span(0, 0, 2), Span(0, 2, 4)))),
        pytest.raises(RouteError, match="packed"),
    ):
        model(torch.ones(1, 4, dtype=torch.long))
