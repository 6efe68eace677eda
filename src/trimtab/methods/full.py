"""Full training of chosen modules (no paper: plain fine-tuning): a copy of each weight, in place of the frozen one.

    y = f(x; W', b'),   W' and b' start as copies

It is how a classification head belongs to an adapter (``LoRA(train=("score",))``), per adapter and under the
same routes; the frozen module stays as it is. With ``targets="all"`` it is full fine-tuning of the model, kept
beside the base instead of in it: a head that is tied to the embedding stays so (where its bias is its own, that is not
trained), and what is no layer, such as the router of a mixture of experts, stays as it is. Of modules that are named,
copies are their own, but for ``tie``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from trimtab.adapt.contract import Place
from trimtab.adapt.replaced import Replaced
from trimtab.adapt.tied import with_tied
from trimtab.errors import TargetError
from trimtab.models.anatomy import Anatomy


@final
class Full(Replaced):
    """``Full(targets=("score",))``: a module that is no layer itself stands for the layers inside it."""

    kind: ClassVar[str] = "full"
    lr: ClassVar[float] = 5e-5
    slot: ClassVar[str] = "modules_to_save"
    disk: ClassVar[Mapping[str, str]] = {
        "modules_to_save.weight": "weight",
        "modules_to_save.bias": "bias",
    }

    tie: bool | None = None
    """Where an embedding or a head is a target and they are tied, they keep sharing one weight; None: of ``all``."""

    def place(self, anatomy: Anatomy) -> Sequence[Place]:
        chosen: list[str] = []
        for path in anatomy.select(self.targets, self.exclude, self.layers):
            inside = [p for p in anatomy.modules if p == path or p.startswith(f"{path}.")]
            if path in anatomy.opened or {*inside} & {*anatomy.opened.values()}:
                raise TargetError(
                    f"{path!r}: an nn.MultiheadAttention cannot be trained in full; train its projections by a method "
                    "that edits them, such as LoRA."
                )
            layers = (
                [path] if path in anatomy.experts else [p for p in inside if anatomy.weighted(p)]
            )
            chosen += [p for p in layers if p not in chosen]
        places = [Place(path) for path in chosen]
        if self.tie or (self.tie is None and self.targets == "all"):
            return with_tied(anatomy, places, more=bool(self.tie))
        return places
