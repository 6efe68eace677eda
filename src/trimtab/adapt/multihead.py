"""Adapters inside ``nn.MultiheadAttention``: a site for its input projection, whose forward calls its layers.

The input projection is a site at the path of its parameter, ``self_attn.in_proj_weight``, the output projection one at
its own, ``self_attn.out_proj``; an adapter has both or none. PEFT wraps the attention, so that in its names, in memory
and on disk,

    self_attn.in_proj_weight.lora_A.weight    is    self_attn.lora_A.weight
    self_attn.out_proj.lora_A.weight          is    self_attn.base_layer.out_proj.lora_A.weight

and of target modules it names the attention alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, cast, final

from torch import Tensor, nn

from trimtab.adapt.edit import enter, leave
from trimtab.adapt.site import BASE, LayerSite, SiteBase
from trimtab.errors import TargetError
from trimtab.frozen.multihead import OUTPUT, PARAMETER, Call, InputProjection, attend


@final
class MultiheadSite(LayerSite):
    """A wrapped ``nn.MultiheadAttention``. Where nobody acts, torch's own forward runs."""

    def __init__(self, base_layer: nn.MultiheadAttention, path: str, bank: Any) -> None:
        super().__init__(base_layer, path, bank, base_layer.embed_dim, base_layer)
        if self._hook is not None:  # the output as a whole is not edited here
            self._hook.remove()
        self._hook, self._hooked = None, False
        self.layer = InputProjection(base_layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bank, module = self.bank, cast(nn.MultiheadAttention, self.frozen)
        bank.fire(f"{self.path}.{PARAMETER}")
        call = Call(*args, **kwargs)
        batched = call.query.dim() == 3
        q, k, v = (
            t.transpose(0, 1) if batched and not module.batch_first else t if batched else t[None]
            for t in (call.query, call.key, call.value)
        )
        parts = bank.context(self.training).layout(q).parts
        if self.covers(parts):
            return self.base_layer(*args, **kwargs)
        out = module.get_submodule(OUTPUT)
        sites = [site for site in (self, out) if isinstance(site, SiteBase)]
        if not any(site.acting(p.owner, training=self.training) for site in sites for p in parts):
            return self._untouched()(*args, **kwargs)
        y, weights = attend(module, call, *self._projected(call, q, k, v))
        y = out(y)
        if weights is not None:
            weights = weights.mean(1) if call.average_attn_weights else weights
            weights = weights if batched else weights[0]
        y = y if batched else y[0]
        return (y if module.batch_first or not batched else y.transpose(0, 1)), weights

    def _projected(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Queries, keys and values, by the edited projection of what each is made of."""
        same = call.query is call.key and call.key is call.value
        whole = [self._edited_projection(q)] * 3 if same else []
        for x in [] if same else [q, k, v]:
            whole.append(self._edited_projection(x))
        width = self.layer.in_features
        return [y[..., n * width : (n + 1) * width] for n, y in enumerate(whole)]

    def _edited_projection(self, x: Tensor) -> Tensor:
        stacks, split, x = self.stacks(x)
        if not any(stacks):
            return self.layer.call(x)
        entered = [enter(s, part.take(x)) for s, part in zip(stacks, split.parts, strict=True)]
        if len(split.parts) == 1 and not split.parts[0].flat:
            return leave(stacks[0], self.layer.call(entered[0]))
        return self._leave(stacks, split, self.layer.call(split.join(entered)))

    def _untouched(self) -> nn.Module:
        """The frozen attention with its frozen output projection, also while merged ones stand in their places."""
        out = self.frozen._modules[OUTPUT]
        if not isinstance(out, SiteBase) or out.frozen is out.base_layer:
            return self.frozen
        bare = copy.copy(self.frozen)
        bare._modules = {**self.frozen._modules, OUTPUT: out.frozen}
        return bare


# -- paths --------------------------------------------------------------------------------------------


def opened(paths: Iterable[str]) -> set[str]:
    """The attentions whose projections are among these sites."""
    ends = f".{PARAMETER}"
    return {path.removesuffix(ends) for path in paths if path.endswith(ends)}


def peft_module(path: str, attentions: Iterable[str]) -> str:
    """PEFT's path of the module that holds a site's tensors."""
    parent, _, leaf = path.rpartition(".")
    if parent not in attentions:
        return path
    return parent if leaf == PARAMETER else f"{parent}.{BASE}.{leaf}"


def own_path(path: str, attentions: Iterable[str]) -> str:
    """The inverse of `peft_module`."""
    if path in attentions:
        return f"{path}.{PARAMETER}"
    around = path.removesuffix(f".{BASE}.{OUTPUT}")
    return f"{around}.{OUTPUT}" if around != path and around in attentions else path


def peft_attentions(keys: Iterable[str], root: str) -> set[str]:
    """The attentions of which a PEFT file holds an output projection; ``root`` stands before all paths."""
    inside = f".{BASE}.{OUTPUT}."
    return {key.removeprefix(root).partition(inside)[0] for key in keys if inside in key}


def named_by_peft(paths: Sequence[str]) -> list[str]:
    """The target modules of these sites: an attention in the place of its projections."""
    attentions = opened(paths)
    named = [p.rpartition(".")[0] if p.rpartition(".")[0] in attentions else p for p in paths]
    return list(dict.fromkeys(named))


def check_opened(paths: Iterable[str], uncalled: Iterable[str]) -> None:
    """Refuse the output projection of an attention that is not opened: nobody calls it.

    Raises:
        TargetError: such a path.
    """
    found = list(paths)
    attentions = opened(found)
    for path in sorted(set(found) & set(uncalled)):
        if path.rpartition(".")[0] not in attentions:
            around, _, leaf = path.rpartition(".")
            inside = around and leaf == OUTPUT
            advice = f"Target {around!r} itself" if inside else "Leave it out of the targets"
            raise TargetError(
                f"{path!r} is never called: its weight is read as it is, and no adapter can edit that. {advice}."
            )
