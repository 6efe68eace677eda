"""Modules that compute something once for all rows of a batch, from layers that adapters edit.

DeBERTa projects its table of relative positions with the layers of queries and keys, once for the batch.
Where rows have different adapters there is no one such table; so the module around it (`Family.apart`) is
called once for each owner, with that owner's rows, and the outputs are put together again. An owner whose
gate decides example by example has each row called alone. A batch of one owner is one call, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from trimtab.adapt.context import Context
from trimtab.adapt.route import Owner
from trimtab.adapt.site import SiteBase
from trimtab.errors import RouteError


class Apart(SiteBase):
    """A wrapped module that is called once per owner."""

    def bare(self) -> bool:
        return not self.bank.adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = self.bank.context(self.training)
        groups = self._groups(context, args, kwargs)
        if not groups:
            return self.base_layer(*args, **kwargs)
        count = sum(map(len, groups))
        outputs = []
        for rows in groups:
            index = torch.tensor(rows)
            own = context.of_rows(index)
            call = self.bank.recall(own, self.base_layer)
            outputs.append(
                call(
                    *(_rows(value, index, count) for value in args),
                    **{key: _rows(value, index, count) for key, value in kwargs.items()},
                )
            )
        return _joined(outputs, torch.tensor([row for rows in groups for row in rows]).argsort())

    def _groups(
        self, context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[list[int]]:
        """Rows that can be called together; none where one plain call does.

        A row with a gate is called by itself even where it is the only one: what its gates carry from layer to layer
        then begins anew after this module, as it does in a batch.
        """
        route = context.route
        gated = {owner for owner in route.owners if self._gated(owner)}
        if route.single is not None and not gated:
            return []
        if route.spans is not None:
            raise RouteError(
                f"{type(self.base_layer).__name__} computes its relative positions once for a whole row, so "
                "documents with different adapters cannot share one; send it padded batches."
            )
        first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        owners = route.owners * first.shape[0] if route.every else route.owners
        groups: dict[tuple[Owner, int], list[int]] = {}
        for row, owner in enumerate(owners):
            groups.setdefault((owner, row if owner in gated else -1), []).append(row)
        return list(groups.values())

    def _gated(self, owner: Owner) -> bool:
        adapters = self.bank.adapters
        return any(method.needs_prompt for name in owner for method in adapters[name].methods)


def _rows(value: Any, index: Tensor, count: int) -> Any:
    """The chosen rows of what has a row for each of the batch; anything else as it is."""
    whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    return value[index.to(value.device)] if whole else value


def _joined(values: Sequence[Any], order: Tensor) -> Any:
    """The outputs of all groups as the output of the batch."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(tuple(values))[order.to(first.device)]
    if isinstance(first, ModelOutput):
        return type(first)(**{key: _joined([v[key] for v in values], order) for key in first})
    if isinstance(first, tuple | list):
        return type(first)(_joined(group, order) for group in zip(*values, strict=True))
    return first
