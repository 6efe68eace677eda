"""The blocks below the lowest one in which an adapter acts, and forwards that begin above them.

    h = block_{k-1}( … block_0( embed(tokens) ) )      depends on nothing that is trained
    y = head( block_{n-1}( … block_k(h) ) )

For the length of a forward the blocks below k have a forward on the instance that hands a given h on; the embeddings,
masks and tables of positions are the model's own. That a family can be cut like that is not read off its code but
*seen*: the blocks are called once each, in their order, give (B, T, C) and nothing else, and the output from a given h
is bitwise that of the whole model.

Shapes: B rows, T tokens, C the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.adapt.acting import using
from trimtab.adapt.adapter import Adapter
from trimtab.adapt.tree import anatomy_of, sites_of
from trimtab.engine.head import uncached
from trimtab.errors import UnsupportedError
from trimtab.models.anatomy import Anatomy

LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""What configs call the share of blocks that training leaves out by chance."""
TOKENS = 64
"""Tokens on which a model is seen; enough cells that no dropout passes unseen."""


@dataclass(frozen=True)
class Lower:
    """The first blocks of a model, in order. ``more``: how many further things, which nothing reads, a block gives in
    a tuple; None where it gives the hidden states alone. These are of ``width`` and ``dtype``."""

    blocks: tuple[nn.Module, ...]
    more: int | None
    width: int
    dtype: torch.dtype

    @contextmanager
    def caught(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Forwards inside show what the last of the blocks gives (B, T, C), at once: it may be changed in place."""

        def after(module: nn.Module, given: Any, out: Any) -> None:
            take((out if self.more is None else out[0]).detach())

        handle = self.blocks[-1].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replaced(self, states_BTC: Tensor) -> Iterator[None]:
        """Forwards inside begin with these hidden states above the blocks, which compute nothing."""
        out = states_BTC if self.more is None else (states_BTC, *[None] * self.more)

        def handed_on(*given: Any, **named: Any) -> Any:
            return out

        before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.__dict__["forward"] = handed_on
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.__dict__["forward"]
                if forward is not None:
                    block.__dict__["forward"] = forward


def lowest(model: nn.Module, adapter: Adapter) -> int:
    """The number of the lowest block in which an adapter acts; that of the blocks, where it acts above all of them.

    Raises:
        UnsupportedError: it acts before the blocks, or where that is not known.
    """
    anatomy = anatomy_of(model)
    kind, name = adapter.method.kind, type(model).__name__
    if not anatomy.blocks:
        raise UnsupportedError(f"{name} has no transformer blocks that Trimtab knows.")
    for method in adapter.methods:
        if method.virtual_tokens or method.prompt_tokens:
            raise UnsupportedError(
                f"{method.kind} puts tokens before the text, so that positions change in every block."
            )
        if method.counts_padding:
            raise UnsupportedError(
                f"{method.kind} learns from a mean over all cells of a batch, and those of padding are not kept."
            )
    outside = [site.path for site in adapter.sites if anatomy.block_of(site.path) is None]
    for path in outside:
        if not _after_blocks(model, anatomy, path):
            raise UnsupportedError(f"{kind} acts at {path!r}, which the first block hears of.")
    numbers = [anatomy.block_of(site.path) for site in adapter.sites]
    return min([n for n in numbers if n is not None], default=len(anatomy.blocks))


def below(model: PreTrainedModel, adapter: Adapter) -> Lower:
    """The blocks below an adapter, in a model that can be run without them.

    Raises:
        UnsupportedError: there are none, or they cannot be left out, or what they give is not the same each time; says
            why.
    """
    anatomy, count = anatomy_of(model), lowest(model, adapter)
    if count == 0:
        raise UnsupportedError(
            f"{adapter.method.kind} acts in the first block already, so that no block lies below it; "
            "name the last blocks, such as layers=[-4, -3, -2, -1]."
        )
    with _seen(model):
        lower = _cut(model, anatomy, count)
        _check_same(model, lower)
        _check_still(model, lower)
    return lower


# -- seen on a few tokens -----------------------------------------------------------------------------


@contextmanager
def _seen(model: PreTrainedModel) -> Iterator[None]:
    """Forwards inside are those of the bare base, in eval mode; what they draw at random is drawn again later."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with using(model, None), torch.no_grad(), torch.random.fork_rng(devices):
            model.eval()
            yield
    finally:
        model.train(training)


def _output(model: PreTrainedModel) -> Tensor:
    """Of a few tokens."""
    config = model.config.get_text_config()
    length = min(int(getattr(config, "max_position_embeddings", None) or TOKENS), TOKENS)
    length -= min(4, length // 2)  # RoBERTa's positions begin after that of padding
    ids = (torch.arange(length, device=model.device)[None] * 7 + 5) % int(config.vocab_size)
    found: Tensor = model(input_ids=ids, **uncached(model))[0]
    return found


def _called(model: PreTrainedModel, modules: Sequence[nn.Module]) -> list[int]:
    """Numbers of these modules in the order in which a forward calls them."""
    order: list[int] = []
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def before(*_: Any, number: int = number) -> None:
                order.append(number)

            stack.callback(module.register_forward_pre_hook(before).remove)
        _output(model)
    return order


def _after_blocks(model: nn.Module, anatomy: Anatomy, path: str) -> bool:
    """Whether a module outside the blocks is called after the last of them, and then only."""
    site = sites_of(model).get(path) or anatomy.modules.get(path)
    if site is None or not isinstance(model, PreTrainedModel):
        return False
    with _seen(model):
        order = _called(model, [*(anatomy.modules[block] for block in anatomy.blocks), site])
    last = len(anatomy.blocks)
    return last in order and order.index(last) > max(
        place for place, number in enumerate(order) if number != last
    )


def _cut(model: PreTrainedModel, anatomy: Anatomy, count: int) -> Lower:
    """The first ``count`` blocks, if all of them give the same kind of thing."""
    blocks = [anatomy.modules[path] for path in anatomy.blocks]
    name = type(model).__name__
    if _called(model, blocks) != list(range(len(blocks))):
        raise UnsupportedError(
            f"{name} does not call each of its blocks once and in order, so none can be left out."
        )
    given: list[Any] = []
    with ExitStack() as stack:
        for block in blocks[:count]:
            hook = block.register_forward_hook(lambda module, args, out: given.append(out))
            stack.callback(hook.remove)
        _output(model)
    forms = {_further(out) for out in given}
    if len(forms) != 1 or -1 in forms:
        raise UnsupportedError(
            f"the blocks of {name} do not give hidden states of shape (rows, tokens, width)."
        )
    more = forms.pop()
    states = given[-1] if more is None else given[-1][0]
    return Lower(tuple(blocks[:count]), more, states.shape[-1], states.dtype)


def _further(out: Any) -> int | None:
    """How many things stand behind hidden states; None: they are alone, and -1: they are something else."""
    states = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(states, Tensor) or states.dim() != 3:
        return -1
    return len(out) - 1 if isinstance(out, tuple) else None


def _check_same(model: PreTrainedModel, lower: Lower) -> None:
    """Raise where the output does not follow from the hidden states alone."""
    found: list[Tensor] = []
    with lower.caught(lambda states: found.append(states.clone())):
        want = _output(model)
    try:
        with lower.replaced(found[0]):
            got = _output(model)
    except Exception as error:
        raise UnsupportedError(_entangled(model, lower)) from error
    if not torch.equal(want, got):
        raise UnsupportedError(_entangled(model, lower))


def _entangled(model: PreTrainedModel, lower: Lower) -> str:
    return (
        f"the upper blocks of {type(model).__name__} need more of its first {len(lower.blocks)} than the hidden states "
        "that these give."
    )


def _check_still(model: PreTrainedModel, lower: Lower) -> None:
    """Raise where the hidden states are not the same each time in training."""
    config = model.config.get_text_config()
    dropped = any(float(getattr(config, name, 0) or 0) for name in LAYER_DROPS)
    found: list[Tensor] = []
    drawn: list[Tensor] = []
    model.train()
    with ExitStack() as stack:
        for block in lower.blocks:

            def note(*_: Any) -> None:
                drawn.append(_random_state(model.device))

            stack.callback(block.register_forward_pre_hook(note).remove)
            stack.callback(block.register_forward_hook(note).remove)
        stack.enter_context(lower.caught(lambda states: found.append(states.clone())))
        for seed in (1, 2):
            torch.manual_seed(seed)
            _output(model)
    model.eval()
    still = all(map(torch.equal, drawn[::2], drawn[1::2]))
    if dropped or not still or not torch.equal(*found):
        raise UnsupportedError(
            f"{type(model).__name__} drops out at random below the adapter in training, so its hidden states differ "
            "each time. Set the dropout in the model's config to 0."
        )


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
