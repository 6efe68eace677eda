"""What the frozen base makes of a text: first values for prompts and prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.adapt import attention
from trimtab.adapt.attend import OURS
from trimtab.adapt.bank import Bank, find_bank
from trimtab.adapt.context import Context, KeysValues
from trimtab.adapt.contract import Init, Place
from trimtab.adapt.injected import KEYWORD, Injected
from trimtab.adapt.route import Route
from trimtab.errors import ConfigError, UnsupportedError
from trimtab.frozen import Layer, view
from trimtab.models.anatomy import Anatomy


def input_embedding(anatomy: Anatomy) -> tuple[str, Layer]:
    """Path and view of the layer that embeds the tokens which a prompt stands before.

    Raises:
        UnsupportedError: the model reads no tokens, or Trimtab does not know where.
    """
    for path in anatomy.role("input_embedding"):
        layer = view(anatomy.modules[path])
        if layer is not None:
            return path, layer
    raise UnsupportedError(
        f"{type(anatomy.root).__name__} has no input embedding of tokens that Trimtab knows, and a prompt is put "
        "before tokens."
    )


def sampled(anatomy: Anatomy) -> Init:
    """Embeddings of tokens drawn from the vocabulary."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        _, layer = input_embedding(anatomy)
        return _rows(layer, torch.randint(layer.in_features, shape[:1], generator=generator))

    return init


def embedded(anatomy: Anatomy, ids: Sequence[int]) -> Init:
    """Embeddings of a text, repeated or cut to the length that is asked for."""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        _, layer = input_embedding(anatomy)
        return _rows(layer, _repeated(ids, shape[0], layer.in_features))

    return init


def read(anatomy: Anatomy, ids: Sequence[int], places: Sequence[Place]) -> Init:
    """(length, 2 · places · C): the keys and values of a text in each attention, as they enter it.

    An encoder-decoder reads the text in both of its stacks.
    """

    def init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        size = int(getattr(anatomy.config, "vocab_size", 0) or 0)
        device = next(anatomy.root.parameters()).device
        text = _repeated(ids, shape[0], size).to(device)[None]
        paths = [place.path for place in places]
        with torch.no_grad(), _catching(anatomy, paths) as caught:
            inputs = {"input_ids": text}
            if anatomy.encoder_decoder:
                inputs["decoder_input_ids"] = text
            anatomy.root(**inputs, use_cache=False)
        missing = [path for path in paths if path not in caught]
        if missing:
            raise UnsupportedError(
                f"reading the text did not reach {missing[0]!r}; its prefix cannot begin there."
            )
        sides = [side[0].transpose(0, 1).flatten(1) for path in paths for side in caught[path]]
        return torch.stack(sides, dim=1).flatten(1).float().cpu()

    return init


def _rows(layer: Layer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.call(ids.to(layer.device)).float().cpu()


def _repeated(ids: Sequence[int], length: int, size: int) -> Tensor:
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise ConfigError(
            f"text: token {wrong[0]} is not in the vocabulary of {size} tokens; tokenise it with the "
            "tokenizer of this base."
        )
    return torch.tensor(list(islice(cycle(ids), length)))


@contextmanager
def _catching(anatomy: Anatomy, paths: list[str]) -> Iterator[KeysValues]:
    """The bare base in evaluation mode, whose attentions leave their keys and values here."""
    root = anatomy.root
    attention.check_reach(root, paths, anatomy, "a prefix from a text")
    before = str(cast(Any, root).config._attn_implementation)
    modes = {module: module.training for module in root.modules()}
    context = Context(Route.everyone(()))
    context.caught = {}
    bank = find_bank(root) or Bank()
    handles = [
        anatomy.modules[path].register_forward_pre_hook(_hand(path, context), with_kwargs=True)
        for path in paths
    ]
    try:
        attention.set_implementation(root, OURS.get(before, before))
        root.eval()
        with bank.scope(Route.everyone(())):
            yield context.caught
    finally:
        for handle in handles:
            handle.remove()
        attention.set_implementation(root, before)
        for module, training in modes.items():
            module.training = training


def _hand(path: str, context: Context) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    injected = Injected(path, context, (), (), None)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, KEYWORD: injected}

    return hook
