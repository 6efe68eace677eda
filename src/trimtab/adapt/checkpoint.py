"""Gradient checkpointing: a block that is recomputed in backward sees the context of its forward.

transformers checkpoints a block by calling the function that it keeps on that block
(``_gradient_checkpointing_func``); that function is wrapped there, on the instance, so that what it is
given to run is bound to the context in force. Enabling checkpointing before or after attaching makes no
difference: the entry hook looks again at each forward. Other code that checkpoints does it by hand:
``checkpoint(captured(model, block), x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.errors import UnsupportedError

if TYPE_CHECKING:
    from trimtab.adapt.bank import Bank

_ATTRIBUTE = "_gradient_checkpointing_func"


class Capturing:
    """The block's own checkpoint function, given functions that remember their context."""

    def __init__(self, inner: Callable[..., Any], bank: Bank) -> None:
        self.inner = inner
        self.bank = bank

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = self.bank.context(True)
        if context.caught is not None:
            return function(*args, **kwargs)  # a prompt is short, and its keys leave the block
        if (context.prompts or context.ready) and self._reentrant():
            raise UnsupportedError(
                "reentrant checkpointing runs a backward for each block by itself, and what stands before the text is "
                "read once for all blocks; enable gradient checkpointing with use_reentrant=False."
            )
        return self.inner(self.bank.capture(function), *args, **kwargs)

    def _reentrant(self) -> bool:
        return isinstance(self.inner, partial) and bool(self.inner.keywords.get("use_reentrant"))


def watch(bank: Bank) -> None:
    """Wrap the checkpoint function of every block that has one by now."""
    for block in bank.blocks:
        function = block.__dict__.get(_ATTRIBUTE)
        if function is not None and not isinstance(function, Capturing):
            block.__dict__[_ATTRIBUTE] = Capturing(function, bank)


def unwatch(model: nn.Module) -> None:
    """Put the blocks' own functions back."""
    for module in model.modules():
        function = module.__dict__.get(_ATTRIBUTE)
        if isinstance(function, Capturing):
            module.__dict__[_ATTRIBUTE] = function.inner


def captured(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` bound to who acts now, for ``torch.utils.checkpoint`` called by hand."""
    from trimtab.adapt.bank import bank_of

    return bank_of(model).capture(function)
