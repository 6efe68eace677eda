"""Looking at the bare model over a few batches, for adapters that begin where data tell them to.

The base is not written, and keeps its flags: gradients are taken of aliases of its weights, which share their
storage and stand in their places for the while. Inputs are decomposed as they come (`trimtab.adapt.pca`);
gradients are summed on the CPU, in fp32 of the size of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapt.acting import using
from trimtab.adapt.bank import find_bank
from trimtab.adapt.context import IGNORED
from trimtab.adapt.observed import Gradients, Inputs, Observation, Observed
from trimtab.adapt.pca import Components
from trimtab.errors import AttachError, DataError, UnsupportedError
from trimtab.frozen import Layer
from trimtab.frozen.experts import run
from trimtab.models.anatomy import Anatomy

Batches = Iterable[Any]
"""Each one call of the model: a mapping is its keyword arguments, anything else its one argument."""


def observe(
    model: nn.Module,
    anatomy: Anatomy,
    wants: Mapping[str, tuple[Sequence[Layer], Observation]],
    batches: Batches | None,
) -> dict[str, list[Observed]]:
    """What the batches show of each layer, by path; experts have one each.

    Args:
        wants: by path, the layer (or those of its experts) and what is asked of it.

    Raises:
        AttachError: no batches.
        DataError: a batch without a loss, or a layer that no batch reaches.
        UnsupportedError: a layer of which this cannot be seen.
    """
    if not wants:
        return {}
    if batches is None:
        raise AttachError(
            "this method begins from data: pass batches to attach, each of them one call of the model "
            "(a dict with input_ids, attention_mask and labels)."
        )
    inputs = {path: (layers, w) for path, (layers, w) in wants.items() if isinstance(w, Inputs)}
    gradients = {
        path: (layers, w) for path, (layers, w) in wants.items() if isinstance(w, Gradients)
    }
    watch = _InputWatch(anatomy, inputs)
    sums = _GradientSums(anatomy, gradients)
    bare: AbstractContextManager[None] = (
        nullcontext() if find_bank(model) is None else using(model, None)
    )
    with ExitStack() as stack:
        stack.enter_context(bare)
        stack.enter_context(_evaluating(model))
        stack.enter_context(watch.hooked())
        stack.enter_context(sums.aliased())
        for batch in batches:
            moved = _moved(batch, next(model.parameters()).device)
            watch.batch = moved
            for part in _rows(moved) if sums.squared else [moved]:
                with torch.set_grad_enabled(bool(gradients)):
                    out = model(**part) if isinstance(part, Mapping) else model(part)
                if gradients:
                    sums.add(out)
            if not gradients and watch.settled:
                break
    return {**watch.found(), **sums.found()}


# -- inputs -------------------------------------------------------------------------------------------


class _InputWatch:
    """Principal components of what goes into layers. Layers that are given one and the same tensor share them."""

    def __init__(self, anatomy: Anatomy, wants: Mapping[str, Any]) -> None:
        self.anatomy = anatomy
        self.batch: Any = None
        self.wants: Mapping[str, tuple[Sequence[Layer], Inputs]] = wants
        self._components: dict[tuple[str, int], Components] = {}
        self._leader: dict[str, str] = {}
        self._newest: tuple[str, Tensor] | None = None
        for layers, _ in wants.values():
            for layer in layers:
                _check_kind(layer)

    @property
    def settled(self) -> bool:
        return all(one.settled for one in self._components.values())

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for path, (layers, _) in self.wants.items():
                where = self.anatomy.experts.get(path, path)
                hook = self._experts(path) if where != path else self._layer(path, layers[0])
                module = self.anatomy.modules[where]
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> dict[str, list[Observed]]:
        found: dict[str, list[Observed]] = {}
        for path, (layers, _) in self.wants.items():
            ones = [
                self._components.get((self._leader.get(path, path), expert))
                for expert in range(len(layers))
            ]
            if None in ones:
                raise _unseen(path, len(ones), ones.index(None))
            found[path] = [
                {
                    "directions": one.directions,
                    "shares": one.shares,
                    "count": torch.tensor(one.count),
                }
                for one in ones
                if one is not None
            ]
        return found

    def _layer(self, path: str, layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if path not in self._leader:
                given = self._newest
                same = given is not None and given[1] is x
                same = same and self.wants[given[0]][1] == self.wants[path][1]
                self._leader[path] = given[0] if same else path
            if self._leader[path] == path:
                self._newest = path, x
                self._see(path, 0, self._visible(path, x, layer))

        return hook

    def _experts(self, path: str) -> Callable[..., None]:
        name = path.rpartition(".")[2]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = (*args, *kwargs.values())[:3]
            visible = self._mask(path, hidden)

            def around(parameter: str, expert: int, layer: Layer, x: Tensor, n: Tensor) -> Tensor:
                if parameter == name:
                    self._see(path, expert, x if visible is None else x[visible[n]])
                return layer.call(x)

            run(module, hidden, index, weights, around)

        return hook

    def _see(self, path: str, expert: int, x_NI: Tensor) -> None:
        if (path, expert) not in self._components:
            want = self.wants[path][1]
            self._components[path, expert] = Components(want.directions, want.alike)
        one = self._components[path, expert]
        if not one.settled:
            one.see(x_NI)

    def _visible(self, path: str, x: Tensor, layer: Layer) -> Tensor:
        """The rows of a layer's input that are no padding, and whose label counts."""
        if layer.kind == "conv":
            return _patches(x, layer)
        mask = self._mask(path, x)
        flat = x.reshape(-1, x.shape[-1])
        return flat if mask is None else flat[mask]

    def _mask(self, path: str, x: Tensor) -> Tensor | None:
        """True at the positions of x (flattened) that count; None is all."""
        masks = self._masks(path)
        positions = x[..., 0].numel()
        fitting = [mask.flatten() for mask in masks if mask.numel() == positions]
        if fitting:
            return torch.stack(fitting).all(0).to(x.device)
        if any(positions != mask.shape[0] and not bool(mask.all()) for mask in masks):
            raise UnsupportedError(
                f"{path} is given {positions} positions, and the batch's masks tell of {masks[0].numel()}: it cannot "
                "be told which are padding. Leave it out of the targets."
            )
        return None

    def _masks(self, path: str) -> list[Tensor]:
        """The (B, T) masks of the tokens that a layer sees: of padding, and of labels that count."""
        if not isinstance(self.batch, Mapping):
            return []
        batch, anatomy = self.batch, self.anatomy
        labels = batch.get("labels")
        counts = None if labels is None or labels.dim() != 2 else labels != IGNORED
        found = [batch.get("attention_mask"), counts]
        if anatomy.encoder_decoder:
            across = path in self._keys and any(name in path for name in _ACROSS)
            if ".decoder." in f".{path}." and not across:
                found = [batch.get("decoder_attention_mask"), counts]
            else:
                found = [batch.get("attention_mask")]
        return [mask.bool() for mask in found if mask is not None and mask.dim() == 2]

    @cached_property
    def _keys(self) -> set[str]:
        """The layers that make keys and values."""
        return {*self.anatomy.role("keys"), *self.anatomy.role("values")}


_ACROSS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")
"""What cross-attention is called, whose keys and values are of the encoder's tokens."""


def _patches(x: Tensor, layer: Layer) -> Tensor:
    """Every patch that a convolution multiplies with its kernel, as rows."""
    rest = layer.matrix_shape()[1]
    eye = torch.eye(rest, dtype=x.dtype, device=x.device).reshape(rest, *layer.shape[1:])
    return layer.apply(x, eye).movedim(1, -1).reshape(-1, rest)


def _check_kind(layer: Layer) -> None:
    if layer.kind == "embedding":
        raise UnsupportedError(
            "the inputs of an embedding are token ids: their principal directions are single tokens, the most "
            "frequent first. Leave embeddings out of the targets of init eva."
        )
    if layer.kind == "conv" and layer.shape[1] != layer.in_features:
        raise UnsupportedError(
            "each group of a grouped convolution sees inputs of its own, and init eva finds one set of directions "
            "for a layer. Leave grouped convolutions out of its targets."
        )


# -- gradients ----------------------------------------------------------------------------------------


class _GradientSums:
    """Sums of the gradients of weights, or of their squares, in canonical orientation."""

    def __init__(self, anatomy: Anatomy, wants: Mapping[str, Any]) -> None:
        self.anatomy = anatomy
        self.wants: Mapping[str, tuple[Sequence[Layer], Gradients]] = wants
        self.squared = any(want.squared for _, want in self.wants.values())
        self._sums: dict[str, Tensor] = {}
        self._aliases: dict[str, nn.Parameter] = {}
        self._count = 0

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Each weight replaced by an alias of its own that takes gradients; tied weights part for the while."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path in self.wants:
                where = self.anatomy.experts.get(path)
                name = path.rpartition(".")[2] if where is not None else "weight"
                module = self.anatomy.modules[path if where is None else where]
                weight = module._parameters.get(name)
                if weight is None or not weight.is_floating_point():
                    raise UnsupportedError(
                        f"{path}: gradients of a weight need one that is stored densely, and this one is not."
                    )
                alias = nn.Parameter(weight.detach())
                alias.register_post_accumulate_grad_hook(self._taker(path))
                replaced.append((module, name, weight))
                module._parameters[name] = self._aliases[path] = alias
            yield
        finally:
            for module, name, weight in replaced:
                module._parameters[name] = weight

    def add(self, out: Any) -> None:
        """The gradients of one loss."""
        loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
        if loss is None or loss.numel() != 1 or not loss.requires_grad:
            raise DataError(
                "a batch gave no loss to take gradients of: pass labels with it (or let the model return a scalar)."
            )
        if not bool(loss.isfinite()):
            raise DataError(
                "the loss of a batch is not a number: an example in it has no label that counts."
            )
        self._count += 1
        loss.backward(inputs=list(self._aliases.values()))

    def found(self) -> dict[str, list[Observed]]:
        found: dict[str, list[Observed]] = {}
        for path, (layers, _) in self.wants.items():
            if path not in self._sums:
                raise _unseen(path, 1, 0)
            mean = self._sums[path] / self._count
            count = torch.tensor(self._count)
            if path not in self.anatomy.experts:
                found[path] = [{"gradient": layers[0].orient(mean), "count": count}]
                continue
            turned = vars(self.anatomy.modules[self.anatomy.experts[path]])["is_transposed"]
            found[path] = [{"gradient": one.T if turned else one, "count": count} for one in mean]
        return found

    def _taker(self, path: str) -> Callable[[Tensor], None]:
        def take(alias: Tensor) -> None:
            if alias.grad is None:
                return
            new = alias.grad.float().cpu()
            new = new.square() if self.squared else new
            self._sums[path] = self._sums[path] + new if path in self._sums else new
            alias.grad = None

        return take


# -- batches ------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no running statistics; each module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _rows(batch: Any) -> Iterator[Any]:
    """The examples of a batch, one by one: the square of a mean is no mean of squares."""
    if not isinstance(batch, Mapping):
        yield from batch.split(1)
        return
    sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    for row in range(sizes[0]):
        yield {
            k: v[row : row + 1]
            if isinstance(v, Tensor) and v.dim() and v.shape[0] == sizes[0]
            else v
            for k, v in batch.items()
        }


def _unseen(path: str, experts: int, expert: int) -> DataError:
    which = f"expert {expert} of {path}" if experts > 1 else path
    return DataError(
        f"no batch reaches {which}, so nothing is known of it; give more batches, or leave it out of the targets."
    )
